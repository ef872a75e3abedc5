"""The shipped pipelines load with diffusers alone and draw as their cards say."""

import json
import re

import pytest
import torch
from diffusers import DiffusionPipeline

from diffalign.registry import data_root
from diffalign.zoo import evaluate, sd3
from diffalign.zoo.oracle import judge
from diffalign.zoo.text import tokenize

ROOM = {"shapes-sd": (0.35, 0.8), "shapes-sd3": (0.35, 0.8), "shapes-turbo": (0.1, 0.6)}
"""Between what shares of two-object test prompts each is right: far from none, far from all."""

NAMES = tuple(ROOM)


def figures(name):
    card = (data_root() / "zoo" / name / "README.md").read_text(encoding="utf-8")
    return json.loads(re.search(r"```json\n(.*?)```", card, re.DOTALL).group(1))


@pytest.fixture(scope="module", params=NAMES)
def pipeline(request):
    pipeline = DiffusionPipeline.from_pretrained(data_root() / "zoo" / request.param)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.zoo_name = request.param
    return pipeline


def test_every_weight_is_single_precision_once_loaded(pipeline):
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert {p.dtype for module in modules for p in module.parameters()} == {torch.float32}


def test_a_plain_call_gives_64_by_64_pixels(pipeline):
    image = pipeline("a red circle", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (64, 64)


def test_images_are_as_right_as_the_card_says(pipeline):
    stated = figures(pipeline.zoo_name)["validation"]
    prompts = evaluate.read_prompts(data_root() / "prompts" / "shapes-validation.jsonl", 16)
    fraction = judge(evaluate.sample(pipeline, prompts, name=pipeline.zoo_name), prompts).fraction.mean()
    # The mean of 16 images with a spread of about 0.25 each lies within 0.2 of the card's mean of 64.
    assert abs(fraction - stated["fraction"]) < 0.2


@pytest.mark.parametrize("name", NAMES)
def test_cards_leave_room_and_say_what_they_are(name):
    test = figures(name)["test"]
    lowest, highest = ROOM[name]
    assert lowest < test["two_objects"] < highest
    assert test["prompts"] == 256


def test_no_config_remembers_where_it_was_made():
    configs = list((data_root() / "zoo").rglob("*.json"))
    assert len(configs) > 10
    for config in configs:
        assert "_name_or_path" not in json.loads(config.read_text(encoding="utf-8")), config


def test_files_are_small():
    files = [file for file in (data_root() / "zoo").rglob("*") if file.is_file()]
    assert max(file.stat().st_size for file in files) < 10e6
    assert sum(file.stat().st_size for file in files) < 60e6


@pytest.mark.parametrize("copies", [16, 256])
def test_the_weighted_attention_of_training_is_the_pipelines_own(copies):
    model = sd3.Denoiser()
    caption = "a small red circle left of an orange star"
    ids = tokenize(model.tokenizer, [caption, ""])
    latents, t = torch.randn(2, 4, 16, 16), torch.tensor([300.0, 700.0])
    with torch.no_grad():
        torch.nn.init.normal_(model.transformer.proj_out.weight)
        model.train()
        model.attention.copies = torch.full((2,), float(copies))
        ours = model.transformer(latents, *model.encode(ids), t).sample
        model.eval()
        pipeline = model.pipeline(vae=None)
        context, _, pooled, _ = pipeline.encode_prompt(
            [caption, ""], None, None, do_classifier_free_guidance=False, max_sequence_length=copies
        )
        theirs = model.transformer(latents, context, pooled, t).sample
    assert context.shape == (2, 16 + copies, 256)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
