"""The resize against Pillow itself, and its gradient against finite differences."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.media import from_pil, quantise, resize, to_uint8

FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
SIZES = [  # (height, width) -> (height, width): down, up, mixed, odd, unchanged on one axis
    ((64, 64), (224, 224)),
    ((64, 64), (32, 32)),
    ((512, 512), (224, 224)),
    ((160, 97), (224, 135)),
    ((131, 257), (64, 33)),
    ((64, 48), (64, 96)),
    ((7, 5), (1, 1)),
    ((90, 40), (30, 80)),
]


def hard_image(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth colour, hard black and white edges and noise: what makes a bicubic filter overshoot."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    smooth = 127 + 120 * np.sin(rows / 7)[..., None] * np.cos(columns / 5)[..., None] * np.array([1, -1, 0.5])
    checks = ((rows // 3 + columns // 4) % 2 * 255)[..., None] * np.ones(3)
    noise = generator.integers(0, 256, (height, width, 3))
    choice = generator.integers(0, 3, (height, width))[..., None]
    return Image.fromarray(np.select([choice == 0, choice == 1], [smooth, checks], noise).clip(0, 255).astype(np.uint8))


def pillow(image: Image.Image, size: tuple[int, int], filter: str) -> np.ndarray:
    """Width first, whatever the version of Pillow: two calls, each of which has one pass."""
    width_first = image.resize((size[1], image.height), FILTERS[filter])
    return np.asarray(width_first.resize((size[1], size[0]), FILTERS[filter]))


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize(("before", "after"), SIZES)
def test_bit_equal_to_pillow(filter, before, after):
    image = hard_image(*before)
    ours = to_uint8(resize(from_pil(image), after, filter))[0].permute(1, 2, 0).numpy()
    assert np.array_equal(ours, pillow(image, after, filter))


@pytest.mark.parametrize("size", [(512, 512), (768, 1344), (1344, 768), (160, 160)])
def test_bit_equal_to_one_call_of_pillow_where_the_shape_is_kept(size):
    image = hard_image(*size)
    scale = 224 / min(size)
    after = (int(size[0] * scale), int(size[1] * scale))
    truth = np.asarray(image.resize(after[::-1], Image.Resampling.BICUBIC))
    assert np.array_equal(to_uint8(resize(from_pil(image), after))[0].permute(1, 2, 0).numpy(), truth)


def test_smooth_and_rounded_differ_only_by_roundings():
    """Where nothing overshoots, two roundings of half a level each hardly exceed one level."""
    image = from_pil(hard_image(64, 64)) * 0.25 + 0.375
    difference = resize(image, (48, 40)) - resize(quantise(image), (48, 40), rounding=False)
    assert 0 < difference.abs().max() * 255 < 1.2


def test_one_pixel_gradient_is_the_filter_column():
    """The map is linear, so finite differences of each output pixel find its row of weights."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(1, 1, 7, 9, dtype=torch.float64, generator=generator).requires_grad_()
    for filter in FILTERS:
        assert torch.autograd.gradcheck(lambda x, f=filter: resize(x, (4, 11), f, rounding=False), images)


def test_rounding_leaves_the_gradient_alone():
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, 3, 20, 30, dtype=torch.float64, generator=generator) * 1.4 - 0.2
    cotangent = torch.randn(2, 3, 12, 50, dtype=torch.float64, generator=generator)
    gradients = []
    for rounding in (True, False):
        leaf = images.clone().requires_grad_()
        (resize(leaf, (12, 50), rounding=rounding) * cotangent).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-12)


def test_every_row_of_weights_sums_to_one():
    flat = torch.full((1, 3, 37, 53), 0.4, dtype=torch.float64)
    for filter in FILTERS:
        for size in [(5, 7), (101, 64)]:
            result = resize(flat, size, filter, rounding=False)
            torch.testing.assert_close(result, torch.full_like(result, 0.4))


def test_half_precision_is_filtered_in_float32():
    images = from_pil(hard_image(33, 20))
    result = resize(images.bfloat16(), (16, 16))
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, resize(images.bfloat16().float(), (16, 16)), rtol=0, atol=0)


def test_refuses_in_words():
    with pytest.raises(TypeError, match="from_uint8"):
        resize(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), (2, 2))
    with pytest.raises(ValueError, match="bicubic, bilinear, lanczos"):
        resize(torch.zeros(1, 3, 4, 4), (2, 2), "nearest")
    with pytest.raises(ValueError, match="at least one pixel"):
        resize(torch.zeros(1, 3, 4, 4), (0, 2))


def test_nan_is_not_hidden():
    images = torch.full((2, 3, 8, 8), 0.5)
    images[1, 0, 0, 0] = float("nan")
    result = resize(images, (4, 4))
    assert not result[0].isnan().any()
    assert result[1, 0].isnan().any()


def test_the_gradient_can_be_differentiated_again():
    images = torch.rand(1, 1, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(resize(images, (4, 9)).pow(2).sum(), images, create_graph=True)
    gradient.square().sum().backward()
    assert images.grad.isfinite().all()
    assert images.grad.abs().sum() > 0
