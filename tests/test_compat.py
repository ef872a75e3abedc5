"""The repaired torchvision is enough for open_clip, in a process beside the other libraries."""

import logging

import pytest

from diffalign._compat import ensure_torchvision


@pytest.mark.timeout(400)  # the first imports compile timm and torchvision
def test_open_clip_and_diffusers_run_beside_a_cpu_torch(with_open_clip):
    printed = with_open_clip(
        "import PIL.Image, open_clip\n"
        "from diffusers import StableDiffusionPipeline\n"
        "image = PIL.Image.new('RGB', (40, 30), (255, 0, 0))\n"
        "transform = open_clip.image_transform(8, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))\n"
        "print(transform(image).mean((1, 2)).tolist())"
    )
    assert printed.splitlines()[-1] == "[1.0, 0.0, 0.0]"


def test_without_torchvision_only_the_word_that_pillow_is_taken_is_left_out(monkeypatch):
    logger = logging.getLogger("transformers.utils.import_utils")
    monkeypatch.setattr(logger, "filters", [])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert ensure_torchvision.__wrapped__() == "absent"
    said = "`CLIPImageProcessor` requires torchvision (not installed); falling back to `CLIPImageProcessorPil`"
    for message in (said, "another warning"):
        record = logger.makeRecord(logger.name, logging.WARNING, __file__, 1, message, (), None)
        assert bool(logger.filter(record)) is (message != said)
