"""Pixels in, pixels out: what diffusers and a saved PNG hold, files to refuse, gradients that must survive."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign import media


def wild_images(seed: int = 0) -> torch.Tensor:
    return torch.rand(3, 3, 8, 10, generator=torch.Generator().manual_seed(seed)) * 1.5 - 0.25


def test_to_uint8_equals_diffusers():
    from diffusers.image_processor import VaeImageProcessor

    images = wild_images()
    theirs = VaeImageProcessor.numpy_to_pil(images.clamp(0, 1).permute(0, 2, 3, 1).numpy())
    for ours, other in zip(media.to_pil(images), theirs, strict=True):
        assert np.array_equal(np.asarray(ours), np.asarray(other))


def test_quantise_is_what_a_saved_png_holds(tmp_path):
    images = wild_images()
    for index, image in enumerate(images):
        media.save_png(image, tmp_path / "deep" / f"{index}.png")
    read = media.from_pil([media.open_image(tmp_path / "deep" / f"{index}.png") for index in range(3)])
    assert torch.equal(read, media.quantise(images))


def test_every_level_survives_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(media.to_uint8(media.from_uint8(levels)), levels)
    pixels = levels.reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(media.from_pil(media.to_pil(pixels)), media.from_uint8(pixels))  # 8-bit pixels as they are
    with pytest.raises(TypeError, match="uint8"):
        media.to_uint8(levels)


def test_clamp_is_exact_and_its_gradient_the_identity():
    x = torch.tensor([-3.0, -0.0, 0.3, 1.0, 1e20], requires_grad=True)
    y = media.straight_through_clamp(x)
    assert torch.equal(y, x.detach().clamp(0, 1))
    cotangent = torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0])
    y.backward(cotangent)
    assert torch.equal(x.grad, cotangent)


def test_quantise_passes_the_gradient_and_keeps_nan():
    x = wild_images().requires_grad_()
    y = media.quantise(x)
    assert torch.equal(y, media.quantise(x.detach()))
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    broken = torch.tensor([float("nan"), 0.5])
    assert media.quantise(broken).isnan().tolist() == [True, False]
    assert media.to_uint8(broken).tolist() == [0, 128]


def test_pictures_are_turned_upright(tmp_path):
    image = Image.new("RGB", (4, 2), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert media.open_image(tmp_path / "turned.jpg").size == (2, 4)


def _png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


@pytest.mark.parametrize(("width", "height"), [(9000, 9000), (12000, 12000), (60000, 60000)])
def test_a_bomb_is_refused_by_its_header(tmp_path, width, height):
    (tmp_path / "bomb.png").write_bytes(_png_header(width, height))
    with pytest.raises(media.ImageError, match=r"bomb\.png"):
        media.open_image(tmp_path / "bomb.png")


def test_other_files_are_refused_in_words(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "blue").save(buffer, "PNG")
    (tmp_path / "cut.png").write_bytes(buffer.getvalue()[:60])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "other.png", "BMP")
    Image.fromarray(np.zeros((4, 4), dtype=np.uint16)).save(tmp_path / "deep.png")
    for name in ("cut", "text", "empty", "folder", "other", "deep"):
        with pytest.raises(media.ImageError, match=rf"{name}\.png"):
            media.open_image(tmp_path / f"{name}.png")
    with pytest.raises(FileNotFoundError, match="none"):
        media.open_image(tmp_path / "none.png")


def test_a_small_pixel_cap_is_kept(tmp_path):
    Image.new("RGB", (10, 10)).save(tmp_path / "ten.webp", lossless=True)
    assert media.open_image(tmp_path / "ten.webp", max_pixels=100).mode == "RGB"
    with pytest.raises(media.ImageError, match="at most 99"):
        media.open_image(tmp_path / "ten.webp", max_pixels=99)


def test_other_modes_become_rgb(tmp_path):
    for mode in ("L", "P", "RGBA", "1", "LA"):
        Image.new(mode, (3, 3)).save(tmp_path / "image.png")
        assert media.open_image(tmp_path / "image.png").mode == "RGB"


def test_grid_places_row_by_row():
    colours = torch.eye(3)[:, :, None, None].expand(3, 3, 5, 6)
    sheet = media.grid(colours, columns=2, gap=1)
    assert sheet.size == (2 * 7 + 1, 2 * 6 + 1)
    assert [sheet.getpixel(xy) for xy in [(1, 1), (8, 1), (1, 7), (8, 7)]] == [
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
        (255, 255, 255),
    ]


def test_batches_of_unlike_sizes_are_refused():
    with pytest.raises(ValueError, match="one size"):
        media.from_pil([Image.new("RGB", (2, 2)), Image.new("RGB", (3, 2))])
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        media.to_pil(torch.zeros(3, 4, 4))
