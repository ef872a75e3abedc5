"""HPSv3 in its published layout against transformers' own processor and model, and its gradients."""

import functools
import hashlib
import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffalign import media, rewards
from diffalign.rewards import check_gradient
from diffalign.rewards.qwen_rewards import HPSv3Reward, hpsv3
from diffalign.rewards.qwen_rewards.hpsv3_template import TEMPLATE
from tests.rewards.pictures import larger_pictures as pictures
from tests.rewards.tiny_qwen import random_model, save_hpsv3, words_of

PROMPTS = ["a cat", "two dogs that run over a wide field, {braces} too", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_hpsv3(tmp_path_factory.mktemp("hpsv3"))


@pytest.fixture(scope="module")
def reward(folder):
    return HPSv3Reward(folder / "HPSv3.safetensors", folder / "base")


def by_hand(folder, image, prompt):
    """(mu, log sigma) by Pillow, transformers' image processor and model, and the published names of the head."""
    from transformers import AutoImageProcessor, AutoTokenizer

    weights, tokenizer = load_file(folder / "HPSv3.safetensors"), AutoTokenizer.from_pretrained(folder / "base")
    template = json.loads((folder / "base" / "chat_template.json").read_text())["chat_template"]
    model = random_model(folder / "base", words_of(folder / "base") + 1)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    image = image.resize((560, 392), Image.Resampling.BICUBIC)
    content = [{"type": "image"}, {"type": "text", "text": TEMPLATE.replace("{prompt}", prompt)}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], chat_template=template, add_generation_prompt=True, tokenize=False
    )
    pixels = AutoImageProcessor.from_pretrained(folder / "base", backend="pil")([image], return_tensors="pt")
    patches = int(pixels["image_grid_thw"].prod() // 4)
    inputs = dict(tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * patches), return_tensors="pt")) | dict(
        pixels
    )
    length = inputs["input_ids"].shape[1]
    with torch.no_grad():
        hidden = model(**inputs, position_ids=torch.arange(length).expand(3, 1, -1)).last_hidden_state[0]
    x = hidden[inputs["input_ids"][0].tolist().index(len(tokenizer) - 1)]
    for number in (0, 3, 5):
        x = weights[f"rm_head.{number}.weight"] @ x + weights[f"rm_head.{number}.bias"]
        x = x.relu() if number < 5 else x
    return x


def test_the_instructions_are_the_published_ones():
    assert hashlib.sha256(TEMPLATE.encode()).hexdigest()[:16] == "e61d58f3c7d3be65"


def test_scores_equal_transformers_own_processing(folder, reward):
    images = list(pictures(2, 200, 300))
    score = reward(media.from_pil(images), PROMPTS[:2])
    truth = torch.stack([by_hand(folder, image, prompt) for image, prompt in zip(images, PROMPTS, strict=False)])
    torch.testing.assert_close(score.value, truth[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(score.sigma, truth[:, 1].exp(), rtol=1e-4, atol=1e-5)
    assert (truth[0, 0] - truth[1, 0]).abs() > 1e-4  # the comparison would notice a mixed-up row
    assert (truth[:, 1].abs() > 1e-2).all()  # or a sigma that is not the exponential


@pytest.mark.parametrize(
    ("height", "width", "size"), [(1024, 1024, (448, 448)), (64, 64, (448, 448)), (200, 300, (392, 560))]
)
def test_small_and_large_images_get_the_same_pixels(reward, height, width, size):
    assert reward.patches.size(height, width) == size


def test_neighbours_and_padding_do_not_change_a_score(reward, monkeypatch):
    images = media.from_pil(list(pictures(3)))
    together = reward(images, PROMPTS)
    alone = [reward(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(together.value, torch.cat([score.value for score in alone]), rtol=0, atol=5e-6)
    torch.testing.assert_close(together.sigma, torch.cat([score.sigma for score in alone]), rtol=0, atol=5e-6)
    monkeypatch.setattr(reward.reader, "batch_size", 2)
    torch.testing.assert_close(together.value, reward(images, PROMPTS).value, rtol=0, atol=5e-6)


def test_a_long_prompt_is_read_to_its_end(reward):
    images = media.from_pil(list(pictures(1))).expand(2, -1, -1, -1)
    long = "a red circle beside a blue square, " * 20
    value = reward(images, [long + "and a cat", long + "and a dog"]).value
    assert (value[0] - value[1]).abs() > 1e-6


@pytest.mark.parametrize("word", ["<|Reward|>", "<|image_pad|>", "<|video_pad|>"])
def test_a_prompt_that_spells_a_token_fails_alone(reward, word):
    images = media.from_pil(list(pictures(2)))
    score = reward(images, ["a cat", f"a cat {word}"])
    assert score.valid.tolist() == [True, False]
    assert "leave it out" in score.reasons[1]
    assert score.value[1].isnan()
    assert score.sigma[1].isnan()


def test_a_broken_image_spoils_no_other(reward):
    images = media.from_pil(list(pictures(2)))
    broken = images.clone()
    broken[1, 0, 3, 3] = torch.nan
    leaf = broken.requires_grad_()
    score = reward(leaf, PROMPTS[:2])
    assert score.valid.tolist() == [True, False]
    torch.testing.assert_close(score.value[0].detach(), reward(images, PROMPTS[:2]).value[0], rtol=0, atol=5e-6)
    score.value[score.valid].sum().backward()
    assert leaf.grad[0].isfinite().all()
    assert leaf.grad[0].abs().max() > 0


def test_scores_have_the_gradient_of_finite_differences(folder, monkeypatch):
    """Along the gradient and along a random direction; rounding is off, for a staircase has no other gradient."""
    monkeypatch.setattr(hpsv3, "resize", functools.partial(media.resize, rounding=False))
    monkeypatch.setattr(hpsv3, "_PIXELS", 64 * 28 * 28)
    reward = HPSv3Reward(folder / "HPSv3.safetensors", folder / "base", dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(1, 3, 60, 90, dtype=torch.float64, generator=generator).mul(0.8).add(0.1)
    leaf = image.clone().requires_grad_()
    gradient = torch.autograd.grad(reward(leaf, ["a cat"]).value.sum(), leaf)[0]
    for direction in (gradient, torch.randn(image.shape, dtype=torch.float64, generator=generator)):
        unit = direction / direction.abs().max()
        ends = [reward(image + sign * 5e-3 * unit, ["a cat"]).value.double() for sign in (1, -1)]
        slope = (ends[0] - ends[1]).item() / 1e-2
        assert slope == pytest.approx((gradient * unit).sum().item(), rel=1e-2, abs=2e-5)
    assert gradient.abs().max() > 1e-6
    assert (check_gradient(reward, image, ["a cat"]) > 0).all()


def test_bfloat16_weights_leave_head_and_frequencies_in_float32(folder, reward):
    half = HPSv3Reward(folder / "HPSv3.safetensors", folder / "base", dtype=torch.bfloat16)
    assert half.reader.model.dtype == torch.bfloat16
    assert half.reader.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    images = media.from_pil(list(pictures(2)))
    torch.testing.assert_close(half(images, PROMPTS[:2]).value, reward(images, PROMPTS[:2]).value, rtol=0.05, atol=0.02)


def test_another_checkpoint_is_refused(folder, tmp_path):
    weights = load_file(folder / "HPSv3.safetensors")
    for change, told in [
        ({"rm_head.5.weight": torch.zeros(3, 6)}, "5.weight"),
        ({"visual.more.weight": torch.zeros(2)}, "visual.more.weight"),
        ({"model.embed_tokens.weight": torch.zeros(9, 32)}, "knows 9 words"),
        ({"model.embed_tokens.weight": torch.zeros(999, 32)}, "knows 999 tokens"),
    ]:
        save_file(weights | change, tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match=told):
            HPSv3Reward(tmp_path / "other.safetensors", folder / "base")
    save_file({"x": torch.zeros(1)}, tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="no checkpoint of a Qwen2-VL reward"):
        HPSv3Reward(tmp_path / "none.safetensors", folder / "base")


def test_a_recipe_builds_it(folder):
    from diffalign.rewards.qwen_rewards import recipes  # noqa: F401

    facts = {"scale": "x", "licence": "x", "source": "x", "needs": ["prompt"], "differentiable": True}
    recipe = {"name": "mine", "type": "hpsv3", "checkpoint": str(folder / "HPSv3.safetensors"), **facts}
    built = rewards.load(recipe | {"base": str(folder / "base"), "dtype": "bfloat16", "batch_size": 3})
    assert (built.name, built.reader.batch_size, built.reader.model.dtype) == ("mine", 3, torch.bfloat16)
