"""MPS from tensors under the published names, against its layers written out."""

import json
import shutil

import pytest
import torch
from torch.nn.functional import cosine_similarity, layer_norm, silu

from diffalign import media
from diffalign.rewards import check_gradient
from diffalign.rewards.mps import MPSReward
from tests.parity.imagereward_case import pictures
from tests.rewards.tiny import mps_cross_weights

WIDTH = 128
TEXTS = ["a red circle", "two blue squares", ""]
CONDITION = "big green, square"


@pytest.fixture(scope="module")
def published(tiny_clip, tmp_path_factory):
    """(base folder, file): the base with a projection of 128 numbers, and the tensors of both modules."""
    from transformers import CLIPConfig, CLIPModel

    base = shutil.copytree(tiny_clip, tmp_path_factory.mktemp("mps") / "base", ignore=lambda *_: ["model.safetensors"])
    config = json.loads((base / "config.json").read_text()) | {"projection_dim": WIDTH}
    (base / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig.from_pretrained(base)).state_dict()
    weights = {f"model.{name}": tensor * (1 if name == "logit_scale" else 3) for name, tensor in clip.items()}
    weights["model.text_model.embeddings.position_ids"] = torch.arange(16)[None]
    torch.save(weights | mps_cross_weights(), base.parent / "MPS.pt")
    return base, base.parent / "MPS.pt"


@pytest.fixture
def reward(published):
    base, file = published
    return MPSReward(file, base, condition=CONDITION)


def batch():
    return media.from_pil(list(pictures([(50, 40)] * 3)))


def turned(x):
    """Rotary positions as products of complex numbers."""
    speed = 10_000.0 ** (-torch.arange(32, dtype=torch.float64) / 32)
    angle = torch.arange(x.shape[-2], dtype=torch.float64)[:, None] * speed
    z = torch.complex(x[..., :32], x[..., 32:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], -1)


def attend(query, key, value, kept=None):
    """Head by head, all on the same key and value."""
    read = []
    for head in query.split(64, -1):
        logits = head @ key.mT / 8
        read.append((logits if kept is None else logits.masked_fill(~kept, -torch.inf)).softmax(-1) @ value)
    return torch.cat(read, -1)


def written_out(weights, x, text, kept, layers=2):
    """(N, D) tokens of one image, (T, D) of one prompt."""
    for layer in (f"cross_model.layers.{number}" for number in range(layers)):
        own = {name.removeprefix(f"{layer}."): w.double() for name, w in weights.items() if name.startswith(layer)}
        h = layer_norm(x, x.shape[-1:], own["0.fn.norm.weight"])
        key, value = (text @ own["0.fn.to_kv.weight"].T).split(64, -1)
        up, gate = (h @ own["0.fn.ff.0.weight"].T).chunk(2, -1)
        read = attend(h @ own["0.fn.to_q.weight"].T, key, value, kept)
        x = x + read @ own["0.fn.to_out.weight"].T + (up * silu(gate)) @ own["0.fn.ff.2.weight"].T
        h = layer_norm(x, x.shape[-1:], own["1.fn.norm.weight"]) @ own["1.fn.fused_attn_ff_proj.weight"].T
        query, key, value, up, gate = h.split([WIDTH, 64, 64, 4 * WIDTH, 4 * WIDTH], -1)
        query = torch.cat([turned(head) for head in query.split(64, -1)], -1)
        x = x + attend(query, turned(key), value) @ own["1.fn.attn_out.weight"].T
        x = x + (up * silu(gate)) @ own["1.fn.ff_out.1.weight"].T
    return x


def test_scores_equal_the_layers_written_out(reward, published, monkeypatch):
    monkeypatch.setattr("diffalign.rewards.mps._THRESHOLD", 0.7)  # at 0.01 a random network reads every word
    clip, encoder, theirs = reward.encoder.model, reward.encoder, []
    weights = torch.load(published[1], weights_only=True)
    for picture, prompt in zip(batch(), TEXTS, strict=True):
        with torch.no_grad():
            read, sought = (clip.text_model(encoder.tokenise(text)["input_ids"]) for text in (prompt, CONDITION))
            text, sought = (clip.text_projection(x.last_hidden_state)[0].double() for x in (read, sought))
            seen = clip.vision_model(encoder.preprocessing(picture[None])).last_hidden_state
            seen = clip.visual_projection(seen)[0].double()
            end = clip.text_projection(read.pooler_output)[0].double()
        product = torch.stack([(text @ word) for word in sought]).amax(0)
        kept = product > 0.7 * product.max()
        assert 0 < kept.double().mean() < 1
        theirs.append(cosine_similarity(written_out(weights, seen, text, kept)[0], end, dim=0) / 0.07)
    score = reward(batch(), TEXTS)
    torch.testing.assert_close(score.value.double(), torch.stack(theirs), rtol=0, atol=1e-4)
    assert torch.stack(theirs).std() > 0.1  # the comparison would notice a difference


def test_words_far_from_the_condition_are_not_read(reward, published, monkeypatch):
    """Above a hundredth of the prompt's own largest product with any token of the condition."""
    prompt = torch.tensor([[2.0, 0.0], [0.0, 0.03], [0.01, 0.01], [-1.0, -1.0]])
    projected = {"words": prompt, "small": prompt / 100, CONDITION: torch.tensor([[1.0, 0.0], [0.0, 1.0]])}
    monkeypatch.setattr(reward, "_projected", lambda text: (projected[text], torch.ones(2)))
    assert reward._text("words")[1].tolist() == [True, True, False, False]
    assert reward._text("small")[1].tolist() == [True, True, False, False]
    other = MPSReward(published[1], published[0], condition="a small circle above the left")
    all_read = other(batch(), TEXTS).value
    monkeypatch.setattr("diffalign.rewards.mps._THRESHOLD", 0.7)
    other._read.clear()
    assert (other(batch(), TEXTS).value - all_read).abs().max() > 1e-3  # what is not read changes the score


def test_a_score_does_not_depend_on_its_batch(reward, published):
    together = reward(batch(), TEXTS).value
    fresh = MPSReward(published[1], published[0], condition=CONDITION)
    alone = torch.cat([fresh(batch()[i : i + 1], TEXTS[i : i + 1]).value for i in (2, 1, 0)]).flip(0)
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-5)


def test_gradient_equals_finite_differences(reward):
    """Through the pixels that the network reads; the resize has its own tests."""
    reward.encoder.model.double()
    reward.cross.double()
    reward._read.clear()
    assert (check_gradient(reward, batch(), TEXTS) > 0).all()
    clip = reward.encoder.model
    tokens, kept, end = (torch.stack(part) for part in zip(*map(reward._text, TEXTS), strict=True))

    def score(pixels):
        patches = clip.visual_projection(clip.vision_model(pixel_values=pixels).last_hidden_state)
        return cosine_similarity(reward.cross(patches, tokens, kept)[:, 0], end.double(), dim=-1).sum()

    pixels = reward.encoder.preprocessing(batch()).double().requires_grad_()
    score(pixels).backward()
    direction = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ahead, behind = (score(pixels.detach() + h * direction) for h in (1e-5, -1e-5))
    torch.testing.assert_close((pixels.grad * direction).sum(), (ahead - behind) / 2e-5, rtol=1e-5, atol=1e-9)


def test_the_names_of_the_mirror_load_too(reward, published, tmp_path):
    from safetensors.torch import save_file

    weights = torch.load(published[1], weights_only=True)
    save_file({f"mps.{name}": tensor.clone() for name, tensor in weights.items()}, tmp_path / "model.safetensors")
    mirror = MPSReward(tmp_path / "model.safetensors", published[0], condition=CONDITION, name="mps")
    torch.testing.assert_close(mirror(batch(), TEXTS).value, reward(batch(), TEXTS).value, rtol=0, atol=2e-5)


def test_another_checkpoint_is_refused(published, tmp_path):
    base, file = published
    weights = torch.load(file, weights_only=True)
    cut = {name: tensor for name, tensor in weights.items() if name != "cross_model.layers.1.1.fn.attn_out.weight"}
    for tensors, words in ((cut, r"own\.attn_out\.weight, none for 128 x 128"), (mps_cross_weights(), "CLIPModel")):
        torch.save(tensors, tmp_path / "other.pt")
        with pytest.raises(ValueError, match=words):
            MPSReward(tmp_path / "other.pt", base)


def test_a_pickled_module_is_refused(published, tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(ValueError, match="no checkpoint of plain tensors"):
        MPSReward(tmp_path / "module.pth", published[0])
