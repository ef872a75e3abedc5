"""SigLIP against transformers, HPS and the aesthetic heads in their published layouts, shared features, open_clip."""

import json
import logging
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffalign import media
from diffalign._compat import ensure_torchvision
from diffalign.registry import data_root
from diffalign.rewards import check_gradient
from diffalign.rewards.aesthetic import AestheticReward, folded
from diffalign.rewards.clip import CLIPReward, PickScoreReward
from diffalign.rewards.encoders import load_encoder, shared_features
from diffalign.rewards.hps import HPSReward, from_open_clip
from diffalign.rewards.preprocessing import ClipPreprocessing
from diffalign.rewards.weights import find_weights, read_weights
from tests.rewards.pictures import PROMPTS, pictures
from tests.rewards.tiny import published_head, write_hps, write_siglip


@pytest.fixture(scope="module")
def images():
    return media.from_pil(list(pictures()))


@pytest.fixture(scope="module")
def tiny_siglip(tmp_path_factory):
    return write_siglip(tmp_path_factory.mktemp("models") / "tiny-siglip")


def test_siglip_scores_equal_transformers(tiny_siglip):
    wide = list(pictures(3, 40, 50))  # newer Pillows squash tall ones height first, see media.resize
    images = media.from_pil(wide)
    from transformers import SiglipModel
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    encoder = load_encoder(tiny_siglip)
    model = SiglipModel.from_pretrained(tiny_siglip).eval()
    pixels = SiglipImageProcessorPil.from_pretrained(tiny_siglip)(wide, return_tensors="pt")["pixel_values"]
    tokens = encoder.tokenizer(PROMPTS, padding="max_length", max_length=20, truncation=True, return_tensors="pt")[
        "input_ids"
    ]
    with torch.no_grad():
        output = model(input_ids=tokens, pixel_values=pixels)
    expected = (output.image_embeds * output.text_embeds).sum(-1)
    found = CLIPReward(encoder)(images, [prompt.upper() for prompt in PROMPTS]).value
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    assert expected.std() > 1e-3
    assert encoder.token_limit == 20
    assert encoder.image_width == 32
    assert (check_gradient(CLIPReward(encoder), images, PROMPTS) > 0).all()


def test_one_pass_of_an_encoder_serves_all_rewards_on_it(tiny_clip, tmp_path, images):
    head = {"weight": torch.randn(1, 16, generator=torch.Generator().manual_seed(0)), "bias": torch.zeros(1)}
    save_file(head, tmp_path / "head.safetensors")
    clip, aesthetic = CLIPReward(tiny_clip, name="clip"), AestheticReward(tiny_clip, tmp_path / "head.safetensors")
    assert clip.encoder is aesthetic.encoder
    both = clip + aesthetic
    calls = []
    handle = clip.encoder.model.vision_model.register_forward_pre_hook(lambda *_: calls.append(1))
    leaf = images.clone().requires_grad_()
    score = both(leaf, PROMPTS)
    assert len(calls) == 1
    (gradient,) = torch.autograd.grad(score.value.sum(), leaf)
    apart = clip(leaf, PROMPTS).value.sum() + aesthetic(leaf, PROMPTS).value.sum()
    assert len(calls) == 3
    torch.testing.assert_close(gradient, torch.autograd.grad(apart, leaf)[0], rtol=1e-4, atol=3e-6)
    with shared_features():
        with torch.no_grad():
            clip(leaf, PROMPTS)
        assert clip(leaf, PROMPTS).value.requires_grad  # features without a graph are not taken for those with one
    handle.remove()


def test_prompts_are_needed_where_they_are_read(tiny_clip, tmp_path):
    save_file({"weight": torch.ones(1, 16), "bias": torch.zeros(1)}, tmp_path / "head.safetensors")
    aesthetic = AestheticReward(tiny_clip, tmp_path / "head.safetensors")
    assert (aesthetic.needs, CLIPReward(tiny_clip).needs, (CLIPReward(tiny_clip) + aesthetic).needs) == (
        (),
        ("prompt",),
        ("prompt",),
    )


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_an_aesthetic_head_of_five_layers_is_one(tiny_clip, tmp_path, images, suffix):
    weights = published_head(16)
    file = tmp_path / f"sac{suffix}"
    save_file(weights, file) if suffix == ".safetensors" else torch.save(weights, file)
    reward = AestheticReward(tiny_clip, file)
    x = reward.encoder.image_features(images).double()
    for layer in ("layers.0", "layers.2", "layers.4", "layers.6", "layers.7"):
        x = x @ weights[f"{layer}.weight"].double().T + weights[f"{layer}.bias"].double()
    score = reward(images, [""] * 3)
    torch.testing.assert_close(score.value.double(), x[:, 0], rtol=1e-5, atol=1e-5)
    assert reward.name == "sac"
    assert (check_gradient(reward, images, [""] * 3) > 0).all()


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"weight": torch.ones(1, 16)}, "no stack of linear layers"),
        ({"weight": torch.ones(2, 16), "bias": torch.ones(2)}, "gives 2 numbers"),
        ({"weight": torch.ones(1, 8), "bias": torch.ones(1)}, "reads embeddings of 8 numbers, and .* makes 16"),
        ({"a.0.weight": torch.ones(4, 16), "a.0.bias": torch.ones(4)} | published_head(5), "gets 4|reads"),
    ],
)
def test_other_heads_are_refused(tiny_clip, tmp_path, weights, words):
    save_file(weights, tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match=words):
        AestheticReward(tiny_clip, tmp_path / "head.safetensors")


def test_layers_are_taken_in_the_order_of_their_numbers():
    random = torch.Generator().manual_seed(1)
    numbers = (2, 10, 9)  # as text 10 stands before 2 and 9
    sizes = {2: (3, 4), 9: (2, 3), 10: (1, 2)}
    weights = {f"layers.{n}.weight": torch.randn(sizes[n], generator=random) for n in numbers}
    weights |= {f"layers.{n}.bias": torch.randn(sizes[n][0], generator=random) for n in numbers}
    matrix, bias = folded(weights, "here")
    x = torch.randn(4, generator=random)
    y = x
    for n in (2, 9, 10):
        y = weights[f"layers.{n}.weight"] @ y + weights[f"layers.{n}.bias"]
    torch.testing.assert_close(matrix @ x + bias, y[0], rtol=1e-5, atol=1e-6)


def test_weights_that_are_more_than_tensors_are_not_read(tmp_path):
    import pathlib

    torch.save({"weight": pathlib.PurePosixPath("/")}, tmp_path / "more.pt")
    torch.save({"weight": 3}, tmp_path / "less.pt")
    (tmp_path / "noise.pt").write_bytes(b"noise")
    for name in ("more.pt", "less.pt", "noise.pt"):
        with pytest.raises(ValueError, match=name):
            read_weights(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="neither a file nor OWNER/NAME/FILE"):
        find_weights("nowhere.pt")


@pytest.fixture
def hps_checkpoint(tiny_clip, tmp_path):
    file = tmp_path / "HPS_v2.1_compressed.pt"
    return write_hps(tiny_clip, file), file


def test_a_published_hps_checkpoint_loads_whole(hps_checkpoint, tiny_clip):
    model, file = hps_checkpoint
    reward = HPSReward(file, tiny_clip)
    found, expected = reward.encoder.model.state_dict(), model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert reward.name == "HPS_v2.1_compressed"
    weights = read_weights(file)
    assert from_open_clip(weights).keys() == {name for name, _ in model.named_parameters()}
    torch.save({"state_dict": weights | {"visual.proj": torch.ones(2, 2)}}, file)
    with pytest.raises(ValueError, match=r"1 of its weights .* differ in shape, such as visual_projection"):
        HPSReward(file, tiny_clip)


def test_hps_letterboxes_float_pixels(hps_checkpoint, tiny_clip, images):
    """The 50 x 40 pictures become 32 x 26 with three black columns on either side, filtered and not rounded."""
    reward = HPSReward(hps_checkpoint[1], tiny_clip)
    pixels = reward.encoder.preprocessing(images)
    mean, std = (
        np.array(x)[:, None, None] for x in (reward.encoder.preprocessing.mean, reward.encoder.preprocessing.std)
    )
    shown = pixels.double().numpy() * std + mean
    expected = torch.nn.functional.interpolate(images, (32, 26), mode="bicubic", antialias=True, align_corners=False)
    assert shown.shape == (3, 3, 32, 32)
    np.testing.assert_allclose(shown[..., :3], 0, atol=1e-6)
    np.testing.assert_allclose(shown[..., -3:], 0, atol=1e-6)
    np.testing.assert_allclose(shown[..., 3:-3], expected, atol=2e-6)
    assert (check_gradient(reward, images, PROMPTS) > 0).all()


def test_an_odd_bar_lies_after_the_image():
    box = ClipPreprocessing(8, None, "bicubic", (0.0,) * 3, (1.0,) * 3, letterbox=True)
    shown = box(torch.ones(1, 3, 8, 5))[0, 0]
    assert shown[0].tolist() == [0, 1, 1, 1, 1, 1, 0, 0]


def test_another_kind_of_model_is_refused(tmp_path):
    ensure_torchvision()
    from transformers import BertConfig

    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="type 'bert', and an encoder is one of clip, siglip"):
        load_encoder(tmp_path)


def test_one_encoder_while_it_is_in_use(tiny_clip):
    first, second = CLIPReward(tiny_clip), PickScoreReward(tiny_clip)
    assert first.encoder is second.encoder
    assert load_encoder(tiny_clip, dtype=torch.bfloat16) is not first.encoder


BESIDE_OPEN_CLIP = """
import json, open_clip, torch
from diffalign import media
from diffalign.rewards.clip import CLIPReward
from tests.rewards.pictures import PROMPTS, pictures
from tests.rewards.tiny import published_head, write_hps, write_siglip
name = "local-dir:" + {folder!r}
pictures = [picture.resize((40, 57)) for picture in pictures()]  # a crop whose offset is half a pixel
model, _, preprocess = open_clip.create_model_and_transforms(name)
with torch.no_grad():
    shown = model.eval().encode_image(torch.stack([preprocess(picture) for picture in pictures]), normalize=True)
    read = model.encode_text(open_clip.get_tokenizer(name)(PROMPTS), normalize=True)
reward = CLIPReward(name, library="open_clip")
images = media.from_pil(pictures).requires_grad_()
value = reward(images, PROMPTS).value
value.sum().backward()
print(json.dumps({{
    "ours": value.tolist(), "theirs": (shown * read).sum(1).tolist(), "limit": reward.token_limit,
    "gradient": float(images.grad.abs().sum()), "width": reward.encoder.image_width,
}}))
"""


def test_a_model_of_open_clip_scores_as_open_clip(with_open_clip):
    folder = data_root() / "zoo" / "shapes-clip"
    found = json.loads(with_open_clip(BESIDE_OPEN_CLIP.format(folder=str(folder))).splitlines()[-1])
    np.testing.assert_allclose(found["ours"], found["theirs"], atol=2e-6)
    assert np.std(found["ours"]) > 0.01
    assert found["gradient"] > 0
    assert found["limit"] == load_encoder(folder).token_limit
    assert found["width"] == load_encoder(folder).image_width


def test_open_clip_that_is_absent_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ValueError, match=r"pip install 'diffalign\[clip\]'"):
        CLIPReward("ViT-B-32/openai", library="open_clip")


def test_a_long_prompt_is_told_with_the_encoders_name(tiny_siglip, images, caplog):
    with caplog.at_level(logging.WARNING, logger="diffalign"):
        CLIPReward(tiny_siglip)(images[:1], ["a red circle left of the square above a big square left of a square"])
    assert "tiny-siglip reads at most 20 tokens" in caplog.text
