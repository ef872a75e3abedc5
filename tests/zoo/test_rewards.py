"""The learned rewards load with their libraries, agree with each other and tell right from wrong."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPModel, CLIPProcessor

from diffalign.registry import data_root
from diffalign.zoo import measure
from diffalign.zoo.render import render
from diffalign.zoo.world import sample_scene


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng, "test") for _ in range(4)]
    pixels = (render(scenes, rng) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(array) for array in pixels], [scene.caption for scene in scenes]


def load(name):
    return CLIPModel.from_pretrained(data_root() / "zoo" / name).eval()


def features(name, images, captions):
    processor = CLIPProcessor.from_pretrained(data_root() / "zoo" / name)
    inputs = processor(text=captions, images=images, return_tensors="pt", padding="max_length")
    with torch.no_grad():
        outputs = load(name)(**inputs)
    return outputs.image_embeds, outputs.text_embeds


BESIDE_OPEN_CLIP = """
import json, sys
import open_clip, torch
from PIL import Image
from safetensors.torch import load_file
path, folder = "local-dir:{model}", "{folder}"
model, _, preprocess = open_clip.create_model_and_transforms(path)
model.eval()
captions = json.load(open(folder + "/captions.json"))
images = torch.stack([preprocess(Image.open(f"{{folder}}/{{i}}.png")) for i in range(len(captions))])
ids = open_clip.get_tokenizer(path)(captions)
expected = load_file(folder + "/features.safetensors")
with torch.no_grad():
    vision, text = model.encode_image(images, normalize=True), model.encode_text(ids, normalize=True)
print(float((vision - expected["vision"]).abs().max()), float((text - expected["text"]).abs().max()))
"""


@pytest.mark.timeout(400)  # the first imports compile timm and torchvision
def test_transformers_and_open_clip_give_equal_features(pictures, with_open_clip, tmp_path):
    images, captions = pictures
    vision, text = features("shapes-clip", images, captions)
    save_file({"vision": vision.contiguous(), "text": text.contiguous()}, tmp_path / "features.safetensors")
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
    printed = with_open_clip(BESIDE_OPEN_CLIP.format(model=data_root() / "zoo" / "shapes-clip", folder=tmp_path))
    assert max(map(float, printed.splitlines()[-1].split())) < 1e-5


def test_the_processor_scales_as_training_did(pictures):
    images, captions = pictures
    vision, text = features("shapes-clip", images, captions)
    pixels = torch.stack([torch.from_numpy(np.array(image)) for image in images]).permute(0, 3, 1, 2) / 255
    scores = measure.similarity_rows(load("shapes-clip"), pixels, captions)
    torch.testing.assert_close(scores, (vision * text).sum(-1), atol=1e-5, rtol=0)


def card(name):
    text = (data_root() / "zoo" / name / "README.md").read_text(encoding="utf-8")
    return json.loads(re.search(r"```json\n(.*?)```", text, re.DOTALL).group(1))


def test_the_training_reward_tells_facts_apart_as_its_card_says():
    stated, found = card("shapes-clip"), measure.retrieval(load("shapes-clip"), count=48)
    for side in ("caption", "image"):
        for kind, accuracy in stated[side].items():
            assert found[side][kind] == pytest.approx(accuracy, abs=0.15), (side, kind)


def test_the_held_out_reward_prefers_what_is_right_as_its_card_says():
    stated, found = card("shapes-preference"), measure.preferences(load("shapes-preference"))
    for kind in ("one_wrong_fact", "spoilt", "against_oracle"):
        assert found[kind] == pytest.approx(stated[kind], abs=0.01), kind


def test_the_labeller_is_stated():
    labeller = json.loads((data_root() / "zoo" / "shapes-preference" / "labeller.json").read_text())
    assert labeller["label_noise"] == 0.1
    assert labeller["prompt_split"] == "train"


def test_the_training_reward_has_a_useful_gradient(pictures):
    # Backpropagation through the reward is what fine-tuning does: along its gradient an image gains on its caption.
    images, captions = pictures
    model = load("shapes-clip").requires_grad_(False)
    pixels = torch.stack([torch.from_numpy(np.array(image)) for image in images]).permute(0, 3, 1, 2) / 255
    pixels.requires_grad_()
    from diffalign.zoo import clip
    from diffalign.zoo.text import clip_tokenizer, tokenize

    ids = tokenize(clip_tokenizer(), captions[::-1])
    vision, text = clip.embed(model, pixels, ids)
    before = (vision * text).sum()
    before.backward()
    moved = pixels.detach() + 0.01 * pixels.grad.sign()
    vision, text = clip.embed(model, moved, ids)
    assert (vision * text).sum() > before
