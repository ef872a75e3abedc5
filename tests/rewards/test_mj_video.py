"""MJ-VIDEO in its published layout against transformers' own model and a head by hand, its tokens and gradients."""

import hashlib
import json
import math
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffalign import media, rewards
from diffalign.rewards import check_gradient
from diffalign.rewards.mj_video import MJVideoReward
from diffalign.rewards.mj_video.reward import frame_indices
from diffalign.rewards.mj_video.template import ANSWER, START, USER
from diffalign.rewards.mj_video.tokenizer import read_tokenizer
from tests.rewards.pictures import larger_pictures as pictures
from tests.rewards.tiny_internvl import random_model, save_mj_video

PROMPTS = ["a cat", "two dogs that run over a wide field, {braces} too"]
ASPECTS = {"alignment": 5, "safety": 6, "fineness": 5, "coherence": 7, "fairness": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_mj_video(tmp_path_factory.mktemp("mj_video"))


@pytest.fixture(scope="module")
def reward(folder):
    return MJVideoReward(folder / "model.safetensors", folder / "base")


def videos(count=2, frames=11, size=(60, 90)):
    return torch.stack([media.from_pil(list(pictures(frames, *size, seed=seed))) for seed in range(count)])


def gate(weights, name, state):
    for number in range(4):
        layer = f"{name}_gating.layers.{number}"
        state = weights[f"{layer}.weight"] @ state + weights[f"{layer}.bias"]
        state = state.clamp(min=0) if number < 3 else state
    return state


def by_hand(folder, video, prompt):
    """Five aspects and the whole of 8-bit frames: Pillow, transformers' model, sums over the criteria."""
    weights, model = load_file(folder / "model.safetensors"), random_model(folder / "base")
    frames = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in video]
    seen = [frames[i] for i in np.linspace(0, len(frames) - 1, 8, endpoint=False, dtype=int)]
    pixels = np.stack([np.asarray(frame.resize((56, 56), Image.Resampling.BICUBIC)) for frame in seen]) / 255
    pixels = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    text = USER.replace("<IMG_CONTEXT>", "<IMG_CONTEXT>" * 32).replace("{prompt}", prompt)
    ids = read_tokenizer(str(folder / "base"), None).encode(START + text + ANSWER).ids
    with torch.no_grad():
        images = torch.tensor(pixels).permute(0, 3, 1, 2).float()
        states = model(input_ids=torch.tensor([ids]), pixel_values=images).last_hidden_state[0]
    rated = weights["regression_layer.weight"] @ states[-1] @ weights["reward_transform_matrix"]
    end = len(ids) - 1 - ids[::-1].index(model.config.image_token_id - 4)  # <|im_end|>
    criteria, aspects = gate(weights, "criteria", states[end]), gate(weights, "aspect", states[end])
    scores, first = [], 0
    for number in ASPECTS.values():
        powers = [math.exp(criteria[c]) for c in range(first, first + number)]
        scores.append(sum(p * rated[first + c].item() for c, p in enumerate(powers)) / sum(powers))
        first += number
    scores = [score * weights["criteria_gating.logit_scale"].item() for score in scores]
    powers = [math.exp(logit) * weights["aspect_gating.logit_scale"].item() for logit in aspects]
    whole = sum(p * s for p, s in zip(powers, scores, strict=True)) / sum(math.exp(logit) for logit in aspects)
    return torch.tensor([*scores, whole])


def test_the_text_is_the_published_one():
    assert hashlib.sha256((START + USER + ANSWER).encode()).hexdigest()[:16] == "5ae8ef1042237e6e"
    assert USER.count("<image>") == 7


def test_scores_equal_those_of_transformers_model(folder, reward):
    clips = videos()
    score = reward(clips, PROMPTS)
    truth = torch.stack([by_hand(folder, media.to_uint8(clips)[i], PROMPTS[i]) for i in range(2)])
    parts = torch.stack([score.parts[f"mj-video-{part}"] for part in (*ASPECTS, "overall")], dim=1)
    torch.testing.assert_close(parts, truth, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(score.value, truth[:, -1], rtol=1e-4, atol=1e-5)
    assert (truth[0] - truth[1]).abs().min() > 1e-3  # the comparison would notice a mixed-up row
    assert truth[0].diff().abs().min() > 1e-3  # or aspect


@pytest.mark.parametrize("count", [1, 2, 8, 9, 16, 17, 81])
def test_eight_frames_at_equal_distances(count):
    assert frame_indices(count) == np.linspace(0, count - 1, 8, endpoint=False, dtype=int).tolist()


def test_words_are_joined_by_rank_and_marks_stand_alone(folder):
    tokenizer = read_tokenizer(str(folder / "base"), None)
    assert tokenizer.encode("a cat<|im_end|><|im_start|>assistant\n").tokens == [
        *("a", "▁cat", "<|im_end|>", "<|im_start|>", "ass", "istant", "\n")
    ]
    assert tokenizer.encode("a  cat").tokens == ["a", "▁", "▁cat"]  # ▁c has a lower id than ▁▁
    assert tokenizer.encode("usy").tokens == ["us", "y"]  # and us than sy
    assert tokenizer.encode("a  x").tokens == ["a", "▁▁", "x"]
    assert tokenizer.encode("<image>é").tokens == ["<0x3C>", "image", "<0x3E>", "<0xC3>", "<0xA9>"]
    assert tokenizer.encode("x[blank]x").tokens == ["x", "[blank]", "x"]


def test_one_forward_pass_serves_every_part(reward, monkeypatch):
    alignment, _, fineness, *_ = reward.members
    calls, read = [], alignment.scorer.reader._read
    monkeypatch.setattr(alignment.scorer.reader, "_read", lambda *inputs: calls.append(1) or read(*inputs))
    clips = videos()
    whole = reward(clips, PROMPTS)
    mixed = (alignment + 0.5 * fineness)(clips, PROMPTS)
    assert len(calls) == 2
    torch.testing.assert_close(
        mixed.value, whole.parts["mj-video-alignment"] + 0.5 * whole.parts["mj-video-fineness"], rtol=0, atol=1e-6
    )


def test_neighbours_and_padding_do_not_change_a_score(reward):
    clips = videos()
    together = reward(clips, PROMPTS).value
    alone = [reward(clips[i : i + 1], PROMPTS[i : i + 1]).value for i in range(2)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=5e-6)


def test_a_long_prompt_is_read_to_its_end_or_refused(reward):
    long = "a red circle beside a blue square, " * 30
    clips = videos(1).expand(3, -1, -1, -1, -1)
    score = reward(clips, [long + "and a cat", long + "and a dog", long * 20])
    assert score.valid.tolist() == [True, True, False]
    assert (score.value[0] - score.value[1]).abs() > 1e-6
    assert "at most 4096: shorten it" in score.reasons[2]


@pytest.mark.parametrize("word", ["<|im_end|>", "<IMG_CONTEXT>", "</img>", "<s>"])
def test_a_prompt_that_spells_a_mark_fails_alone(reward, word):
    score = reward(videos(), ["a cat", f"a cat {word}"])
    assert score.valid.tolist() == [True, False]
    assert f"spells {word}, a mark of the model: leave it out" in score.reasons[1]


def test_gradients_reach_the_frames_that_are_seen(folder):
    """And are those of finite differences, with the rounding off, for a staircase has no other gradient."""

    def resize(images, size, filter, **_):
        return media.resize(images, size, filter, rounding=False)

    with (
        patch("diffalign.rewards.preprocessing.resize", resize),
        patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        small = MJVideoReward(folder / "model.safetensors", folder / "base", dtype=torch.float64)
        generator = torch.Generator().manual_seed(1)
        clip = torch.rand(1, 11, 3, 50, 70, dtype=torch.float64, generator=generator).mul(0.8).add(0.1)
        leaf = clip.clone().requires_grad_()
        gradient = torch.autograd.grad(small(leaf, ["a cat"]).value.sum(), leaf)[0]
        seen = gradient.abs().amax(dim=(0, 2, 3, 4)) > 0
        assert seen.nonzero().flatten().tolist() == frame_indices(11)
        for direction in (gradient, torch.randn(clip.shape, dtype=torch.float64, generator=generator)):
            unit = direction / direction.abs().max()
            ends = [small(clip + sign * 1e-3 * unit, ["a cat"]).value for sign in (1, -1)]
            slope = (ends[0] - ends[1]).item() / 2e-3
            assert slope == pytest.approx((gradient * unit).sum().item(), rel=1e-2)  # parts are float32 for good
        assert (check_gradient(small, clip, ["a cat"]) > 0).all()


def test_bfloat16_weights_leave_the_head_in_float32(folder, reward):
    half = MJVideoReward(folder / "model.safetensors", folder / "base", dtype=torch.bfloat16)
    scorer = half.members[0].scorer
    assert (scorer.reader.model.dtype, scorer.head.regression_layer.weight.dtype) == (torch.bfloat16, torch.float32)
    close = half(videos(), PROMPTS).value - reward(videos(), PROMPTS).value
    assert 0 < close.abs().max() < 0.1


def test_another_checkpoint_is_refused(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    for change, told in [
        ({"regression_layer.weight": torch.zeros(10, 32)}, "regression_layer.weight, 10 x 32 for 28 x 32"),
        ({"model.vision_model.more.weight": torch.zeros(2)}, "vision_model.more.weight"),
        ({"model.language_model.model.tok_embeddings.weight": torch.zeros(9, 32)}, "embed_tokens.weight, 9 x 32"),
    ]:
        save_file(weights | change, tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match=told):
            MJVideoReward(tmp_path / "other.safetensors", folder / "base")
    save_file({"x": torch.zeros(1)}, tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="no checkpoint of a"):
        MJVideoReward(tmp_path / "none.safetensors", folder / "base")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"ps_version": "v1"}, "ps_version of its base is 'v1', and only 'v2'"),
        ({"llm_config": {"architectures": ["LlamaForCausalLM"]}}, "llm of its base is 'LlamaForCausalLM'"),
        ({"vision_config": {}}, "lacks hidden_size"),
    ],
)
def test_another_base_is_refused(folder, tmp_path, change, told):
    for file in (folder / "base").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tree = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(tree | change))
    with pytest.raises(ValueError, match=told):
        MJVideoReward(folder / "model.safetensors", tmp_path)


def test_a_recipe_builds_it(folder):
    from diffalign.rewards.mj_video import recipes  # noqa: F401

    facts = {"scale": "x", "licence": "x", "source": "x", "needs": ["prompt"], "differentiable": True}
    places = {"checkpoint": str(folder / "model.safetensors"), "base": str(folder / "base"), "batch_size": 3}
    built = rewards.load({"name": "mine", "type": "mj_video"} | places | facts)
    assert [member.name for member in built.members] == [f"mine-{part}" for part in (*ASPECTS, "overall")]
    assert (built.media, built.members[0].scorer.reader.batch_size) == ("video", 3)
