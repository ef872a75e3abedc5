"""CLIPReward against transformers' own processor and forward pass."""

import json
import logging
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffalign import media
from diffalign.rewards import check_gradient
from diffalign.rewards.clip import CLIPReward, PickScoreReward
from diffalign.rewards.encoders import load_encoder
from diffalign.rewards.preprocessing import ClipPreprocessing
from tests.rewards.pictures import PROMPTS, pictures


def transformers_scores(folder, images, prompts):
    from transformers import AutoTokenizer, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model = CLIPModel.from_pretrained(folder).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(prompts, padding=True, return_tensors="pt")
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        output = model(pixel_values=pixels, **tokens)
    return torch.nn.functional.cosine_similarity(output.image_embeds, output.text_embeds), output.logits_per_image


def test_scores_equal_transformers(tiny_clip):
    images = list(pictures())
    cosine, logits = transformers_scores(tiny_clip, images, PROMPTS)
    score = CLIPReward(tiny_clip)(media.from_pil(images), PROMPTS)
    torch.testing.assert_close(score.value, cosine, rtol=0, atol=2e-6)
    preference = PickScoreReward(tiny_clip)(media.from_pil(images), PROMPTS)
    torch.testing.assert_close(preference.value, logits.diagonal(), rtol=1e-5, atol=1e-4)
    assert cosine.std() > 0.01  # the comparison would notice a difference
    assert score.valid.all()


SHORTEST, SQUARE = {"shortest_edge": 32}, {"height": 32, "width": 32}


@pytest.mark.parametrize(
    ("size", "edge"),
    [
        *((size, SHORTEST) for size in [(64, 64), (50, 40), (40, 61), (32, 32), (20, 20), (97, 333)]),
        # tall images only with the aspect kept: newer Pillows squash them height first, see media.resize
        *((size, SQUARE) for size in [(64, 64), (40, 61), (97, 333)]),
    ],
)
def test_preprocessing_equals_the_image_processor(size, edge):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size=edge, crop_size={"height": 32, "width": 32})
    images = list(pictures(2, *size))
    theirs = torch.as_tensor(np.stack(processor(images)["pixel_values"]))
    ours = ClipPreprocessing.from_config(processor.to_dict() | {"size": edge})(media.from_pil(images))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)  # one level in 255 is 0.014


def test_reads_the_older_forms_of_a_config():
    new = ClipPreprocessing.from_config({"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}})
    assert ClipPreprocessing.from_config({"size": 224, "crop_size": 224, "resample": 3}) == new
    assert ClipPreprocessing.from_config({}) == new


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"resample": 0}, "resample = 0"),
        ({"size": {"longest_edge": 224}}, "longest_edge"),
        ({"rescale_factor": 1 / 127.5}, "rescale"),
        ({"size": 200}, "pad"),
    ],
)
def test_other_preprocessing_is_refused(config, words):
    with pytest.raises(ValueError, match=words):
        ClipPreprocessing.from_config(config)


def test_a_float_image_scores_as_its_saved_file(tiny_clip, tmp_path):
    reward = CLIPReward(tiny_clip)
    images = torch.rand(1, 3, 50, 40, generator=torch.Generator().manual_seed(0))
    media.save_png(images[0], tmp_path / "image.png")
    saved = media.from_pil(media.open_image(tmp_path / "image.png"))
    assert torch.equal(reward(images, PROMPTS[:1]).value, reward(saved, PROMPTS[:1]).value)


def test_gradient_is_that_of_the_smooth_path(tiny_clip, monkeypatch):
    """Along random directions the gradient equals finite differences of the same network without the roundings."""
    encoder = load_encoder(tiny_clip)
    encoder.model.double()
    encoder.preprocessing = replace(encoder.preprocessing, rounding=False)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    images = media.from_pil(list(pictures())).double() * 0.8 + 0.1
    leaf = images.clone().requires_grad_()
    encoder.cosine(leaf, PROMPTS).sum().backward()
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        direction = torch.randn(images.shape, generator=generator, dtype=torch.float64)
        ahead, behind = (encoder.cosine(images + h * direction, PROMPTS).sum() for h in (1e-5, -1e-5))
        torch.testing.assert_close((leaf.grad * direction).sum(), (ahead - behind) / 2e-5, rtol=1e-5, atol=1e-9)


def test_gradient_reaches_the_images_and_not_the_weights(tiny_clip):
    reward = CLIPReward(tiny_clip)
    assert (check_gradient(reward, media.from_pil(list(pictures())), PROMPTS) > 0).all()
    assert not any(p.requires_grad for p in reward.encoder.model.parameters())
    assert not any(module.training for module in reward.encoder.model.modules())


def test_scores_do_not_depend_on_the_batch(tiny_clip):
    images = media.from_pil(list(pictures()))
    together = CLIPReward(tiny_clip)(images, PROMPTS).value
    alone = CLIPReward(tiny_clip)
    rows = [alone(images[i : i + 1], [PROMPTS[i]]).value for i in (2, 0, 1)]
    torch.testing.assert_close(torch.cat([rows[1], rows[2], rows[0]]), together, rtol=0, atol=1e-6)


def test_each_prompt_is_encoded_once(tiny_clip):
    reward = CLIPReward(tiny_clip)
    calls = []
    model = reward.encoder.model
    encode = model.get_text_features
    model.get_text_features = lambda **tokens: calls.append(1) or encode(**tokens)
    images = media.from_pil(list(pictures(4)))
    with torch.inference_mode():
        reward(images, ["a red circle", "a red circle", "the square", "a red circle"])
    check_gradient(reward, images[:1], ["the square"])  # what was kept in inference mode meets autograd
    assert len(calls) == 2


def test_long_prompts_are_cut_said_and_counted(tiny_clip, caplog):
    reward = CLIPReward(tiny_clip)
    assert reward.token_limit == 16
    images = media.from_pil(list(pictures(2)))
    with caplog.at_level(logging.WARNING, logger="diffalign"):
        reward(images, ["a red circle left of a blue square", "a red circle above a big blue square"])
    assert reward.encoder.truncated_prompts == 2
    assert len(caplog.messages) == 1
    assert "at most 16 tokens" in caplog.messages[0]
    ids = reward.encoder.tokenise("a red circle left of a blue square")["input_ids"][0]
    assert ids[-1] == reward.encoder.tokenizer.eos_token_id  # CLIP reads the whole prompt from its end token


def test_a_tokenizer_without_vocabulary_is_refused(tiny_clip, tmp_path):
    from transformers import CLIPTokenizer

    folder = shutil.copytree(tiny_clip, tmp_path / "broken")
    CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[], model_max_length=16).save_pretrained(
        folder
    )
    with pytest.raises(ValueError, match="vocabulary did not load"):
        CLIPReward(folder)


def test_a_checkpoint_with_absent_weights_is_refused(tiny_clip, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_clip, tmp_path / "partial")
    weights = load_file(folder / "model.safetensors")
    weights.pop("visual_projection.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of a CLIPModel, such as visual_projection\.weight"):
        CLIPReward(folder)


def test_processor_may_lie_elsewhere(tiny_clip, tmp_path):
    weights, processor = tmp_path / "weights", tmp_path / "processor"
    weights.mkdir(), processor.mkdir()
    for path in tiny_clip.iterdir():
        shutil.copy(path, weights if path.name in ("model.safetensors", "config.json") else processor)
    images = media.from_pil(list(pictures()))
    reward = CLIPReward(weights, processor=processor)
    assert torch.equal(reward(images, PROMPTS).value, CLIPReward(tiny_clip)(images, PROMPTS).value)
    assert reward.name == "weights"


def test_bfloat16_weights_stay_close(tiny_clip):
    images = media.from_pil(list(pictures()))
    low = CLIPReward(tiny_clip, dtype=torch.bfloat16)(images, PROMPTS).value
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, CLIPReward(tiny_clip)(images, PROMPTS).value, rtol=0, atol=0.03)


def test_autocast_round_the_reward_changes_nothing(tiny_clip):
    reward = CLIPReward(tiny_clip)
    images = media.from_pil(list(pictures()))
    plain = reward(images, PROMPTS).value
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(CLIPReward(tiny_clip)(images, PROMPTS).value, plain)


def test_reads_a_nested_processor_config(tiny_clip, tmp_path):
    """transformers 5 saves a whole processor as processor_config.json."""
    folder = shutil.copytree(tiny_clip, tmp_path / "nested")
    config = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(
        json.dumps({"image_processor": config, "processor_class": "CLIPProcessor"})
    )
    assert load_encoder(folder).preprocessing == load_encoder(tiny_clip).preprocessing
