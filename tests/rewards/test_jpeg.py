"""JPEG size: the file's own size, in DDPO's units and sign."""

import io
import math

import torch

from diffalign import media, rewards
from diffalign.rewards.jpeg import JpegSize


def pictures():
    noise = torch.rand(3, 40, 56, generator=torch.Generator().manual_seed(0))
    plain = torch.full((3, 40, 56), 0.4)
    return torch.stack([noise, plain, noise.mean(0, keepdim=True).expand(3, -1, -1)])


def test_is_the_size_of_the_saved_file_in_kilobytes(tmp_path):
    images = pictures()
    score = JpegSize()(images, ["", "", ""])
    for index, picture in enumerate(media.to_pil(images)):
        picture.save(tmp_path / "saved.jpg", quality=95)
        assert score.value[index].item() == torch.tensor((tmp_path / "saved.jpg").stat().st_size / 1000).item()
    assert score.value[0] > score.value[2] > score.value[1] > 0.3  # noise, grey noise, nothing


def test_compressibility_is_its_negative_and_no_prompt_matters():
    images, reward = pictures(), JpegSize()
    total = (-1.0 * reward)(images, ["a", "b", "c"]).value
    assert torch.equal(total, -reward(images, ["", "", ""]).value)
    assert reward.needs == ()
    assert not reward.differentiable


def test_agrees_with_a_jpeg_of_the_eight_bit_pixels_and_not_of_the_batch():
    images = pictures()
    buffer = io.BytesIO()
    media.to_pil(media.quantise(images))[0].save(buffer, "JPEG", quality=95)
    alone = JpegSize()(images[:1], [""]).value
    assert alone.item() == torch.tensor(buffer.tell() / 1000).item()
    assert torch.equal(alone, JpegSize()(images, ["", "", ""]).value[:1])


def test_a_broken_image_has_no_size():
    images = pictures()
    images[1, 0, 3, 3] = math.nan
    score = JpegSize()(images, ["", "", ""])
    assert score.valid.tolist() == [True, False, True]
    assert rewards.as_reward(JpegSize()).name == "jpeg-size"
