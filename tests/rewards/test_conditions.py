"""Edges against loops and finite differences, depth and segmentation against transformers, Ctrl-U's weighting."""

import logging
import math
import re

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from diffalign import media
from diffalign.rewards import check_gradient
from diffalign.rewards.conditions import (
    DepthConsistency,
    EdgeConsistency,
    SegmentationConsistency,
    edge_strength,
    uncertainty_weighted_loss,
)
from diffalign.rewards.networks import NetworkPreprocessing
from tests.rewards.pictures import pictures
from tests.rewards.tiny_vision import write_depth_anything, write_dino, write_dpt, write_segformer


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {"dpt": write_dpt(folder / "dpt"), "segformer": write_segformer(folder / "segformer")}


@pytest.fixture(scope="module")
def depth(models):
    return DepthConsistency(models["dpt"])


@pytest.fixture(scope="module")
def segmentation(models):
    return SegmentationConsistency(models["segformer"])


@pytest.fixture(scope="module")
def wide():
    return list(pictures(3, 40, 50))


@pytest.fixture(scope="module")
def images(wide):
    return media.from_pil(wide)


def pixel_by_pixel(image):
    """Canny's strengths of an image (3, H, W), in loops."""
    grey = np.tensordot([0.299, 0.587, 0.114], image, 1)
    bell = np.exp(-(np.arange(-2, 3) ** 2) / 2)
    padded = np.pad(grey, 2, mode="reflect")
    height, width = grey.shape
    blurred = np.zeros_like(grey)
    for y in range(5):
        for x in range(5):
            blurred += bell[y] * bell[x] / bell.sum() ** 2 * padded[y : y + height, x : x + width]
    p = np.pad(blurred, 1, mode="edge")
    right = (p[:-2, 2:] - p[:-2, :-2]) + 2 * (p[1:-1, 2:] - p[1:-1, :-2]) + (p[2:, 2:] - p[2:, :-2])
    down = (p[2:, :-2] - p[:-2, :-2]) + 2 * (p[2:, 1:-1] - p[:-2, 1:-1]) + (p[2:, 2:] - p[:-2, 2:])
    strength = np.sqrt(right**2 + down**2 + 1e-6)
    kept = np.zeros_like(strength)
    for y in range(height):
        for x in range(width):
            turn = round(math.degrees(math.atan2(down[y, x], right[y, x])) / 45) * 45
            step = [round(math.sin(math.radians(turn))), round(math.cos(math.radians(turn)))]
            sides = []
            for sign in (1, -1):
                i, j = y + sign * step[0], x + sign * step[1]
                sides.append(strength[i, j] if 0 <= i < height and 0 <= j < width else 0)
            kept[y, x] = strength[y, x] if strength[y, x] > max(sides) else 0
    return kept


def test_edges_equal_loops_over_pixels():
    image = torch.rand(2, 3, 21, 26, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = edge_strength(image)
    for row, expected in zip(found, image.numpy(), strict=True):
        np.testing.assert_allclose(row.numpy(), pixel_by_pixel(expected), atol=1e-12)
    assert 0.1 < (found > 0).double().mean() < 0.6


@pytest.mark.parametrize("turns", range(4))
def test_a_sharp_edge_is_one_pixel_wide(turns):
    step = torch.zeros(1, 3, 12, 12)
    step[..., 6:] = 1
    strength = edge_strength(step.rot90(turns, (-2, -1)))[0]
    strong = strength > 0.01
    assert strong.sum() == 12
    assert strong.any(dim=turns % 2).sum() == 1  # a straight line, of one row or column
    bell = np.exp(-(np.arange(-2, 3) ** 2) / 2) / np.exp(-(np.arange(-2, 3) ** 2) / 2).sum()
    # Sobel's weights sum to 4; the blurred step rises by the bell's middle and one side around each of its two pixels
    torch.testing.assert_close(strength[strong], torch.full((12,), 4 * float(bell[2] + bell[1])), rtol=1e-5, atol=0)


def test_edge_score_is_minus_the_mean_square_and_has_its_gradient(images):
    reward, wanted = EdgeConsistency(), images[0]
    scores = reward(images, [""] * 3, [{"edges": wanted}] * 3).value
    expected = -((edge_strength(images) - edge_strength(wanted[None])) ** 2).mean((1, 2))
    torch.testing.assert_close(scores, expected)
    assert scores[0] == 0
    assert (scores[1:] < -1e-3).all()

    generator = torch.Generator().manual_seed(1)
    leaf = torch.rand(1, 3, 9, 11, dtype=torch.float64, generator=generator, requires_grad=True)
    target = [{"edges": torch.rand(9, 11, dtype=torch.float64, generator=generator)}]
    (gradient,) = torch.autograd.grad(reward(leaf, [""], target).value.sum(), leaf)
    way, step = torch.randn(leaf.shape, dtype=torch.float64, generator=generator), 1e-6
    with torch.no_grad():
        up, down = (reward(leaf + sign * step * way, [""], target).value for sign in (1, -1))
    torch.testing.assert_close((up - down) / (2 * step), (gradient * way).sum()[None], rtol=1e-6, atol=1e-9)


def test_the_picture_of_the_edges_is_read_and_resized(images, wide, tmp_path):
    media.save_png(wide[0].resize((100, 80)), tmp_path / "big.png")
    reward = EdgeConsistency()
    file, tensor = (
        reward(images, [""] * 3, [{"edges": given}] * 3)
        for given in (tmp_path / "big.png", media.from_pil(wide[0].resize((100, 80)))[0])
    )
    assert torch.equal(file.value, tensor.value)
    assert file.value.argmax() == 0
    failed = reward(images, [""] * 3, [{"edges": torch.zeros(20, 20)}, {}, {"edges": str(tmp_path)}])
    assert not failed.valid.any()
    for index, words in enumerate(["give the picture that they were found in", "must be a path", "is a folder"]):
        assert words in failed.reasons[index]


def test_depth_equals_transformers(models, depth, images, wide):
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation

    processor = AutoImageProcessor.from_pretrained(models["dpt"], backend="pil")
    model = AutoModelForDepthEstimation.from_pretrained(models["dpt"]).eval()
    with torch.no_grad():
        raw = model(**processor(wide, return_tensors="pt")).predicted_depth
    full = torch.nn.functional.interpolate(raw[None], (40, 50), mode="bilinear", antialias=True)[0]
    full = full / full.amax((1, 2), keepdim=True)
    wanted = torch.rand(40, 50, generator=torch.Generator().manual_seed(0))
    expected = -((full - wanted / wanted.max()) ** 2).mean((1, 2))
    found = depth(images, [""] * 3, [{"depth": wanted}] * 3).value
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert full.std() > 0.01

    own = [{"depth": 7 * each} for each in depth.predict(images)]  # units do not matter
    torch.testing.assert_close(depth(images, [""] * 3, own).value, torch.zeros(3), rtol=0, atol=1e-9)
    assert (check_gradient(depth, images, [""] * 3, [{"depth": wanted}] * 3) > 0).all()


def test_depth_of_a_network_that_keeps_the_ratio_of_the_sides(tmp_path):
    reward, images = (
        DepthConsistency(write_depth_anything(tmp_path / "small")),
        media.from_pil(list(pictures(2, 30, 64))),
    )
    assert reward.network.preprocessing(images).shape == (2, 3, 28, 56)
    own = [{"depth": each} for each in reward.predict(images)]
    assert reward(images, ["", ""], own).value.tolist() == [0, 0]
    assert (check_gradient(reward, images, ["", ""], [{"depth": torch.rand(30, 64)}] * 2) > 0).all()


def test_depth_maps_without_depth_fail(models, depth, images, tmp_path):
    media.save_png(torch.zeros(3, 8, 8), tmp_path / "black.png")
    score = depth(images[:2], ["", ""], [{"depth": tmp_path / "black.png"}, {"depth": torch.ones(3, 8, 8)}])
    assert score.valid.tolist() == [False, True]
    assert "maximum 0" in score.reasons[0]
    flat = DepthConsistency(write_dpt(tmp_path / "flat", bias=-100.0))
    assert "nan" in flat(images[:1], [""], [{"depth": torch.ones(8, 8)}]).reasons[0]


def test_segmentation_is_minus_the_mean_log_probability(models, segmentation, images, wide, tmp_path):
    from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

    processor = AutoImageProcessor.from_pretrained(models["segformer"], backend="pil")
    model = AutoModelForSemanticSegmentation.from_pretrained(models["segformer"]).eval()
    with torch.no_grad():
        logits = model(**processor(wide, return_tensors="pt")).logits
    labels = torch.randint(5, (32, 48), generator=torch.Generator().manual_seed(0))
    labels[:9] = 255
    log_p, total, count = logits.log_softmax(1).double(), torch.zeros(3, dtype=torch.float64), 0
    for y in range(16):
        for x in range(16):
            label = int(labels[2 * y, 3 * x])  # nearest on the grid of 16 x 16
            if label != 255:
                total, count = total + log_p[:, label, y, x], count + 1
    media.save_png((labels / 255).expand(3, -1, -1), tmp_path / "labels.png")
    for given in (labels, labels[None].int(), tmp_path / "labels.png"):
        found = segmentation(images, [""] * 3, [{"segmentation": given}] * 3).value
        torch.testing.assert_close(found, (total / count).float(), rtol=1e-5, atol=1e-6)
    assert found.std() > 1e-3
    assert (check_gradient(segmentation, images, [""] * 3, [{"segmentation": labels}] * 3) > 0).all()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (torch.full((8, 8), 255), "counts no pixel"),
        (torch.full((8, 8), 5), "has class 5, and the network knows 0 to 4"),
        (torch.full((8, 8), -1), "has class -1"),
        (torch.ones(8, 8), "give integers"),
        (torch.ones(3, 8, 8, dtype=torch.long), "give integers"),
        ("colours.png", "colours: save the class numbers as grey levels"),
    ],
)
def test_wrong_segmentations_fail_alone(segmentation, images, wide, tmp_path, given, words):
    media.save_png(wide[0], tmp_path / "colours.png")
    given = tmp_path / given if isinstance(given, str) else given
    right = torch.zeros(8, 8, dtype=torch.long)
    score = segmentation(images[:2], ["", ""], [{"segmentation": given}, {"segmentation": right}])
    assert score.valid.tolist() == [False, True]
    assert re.search(words, score.reasons[0])


def test_scores_do_not_depend_on_the_batch(depth, segmentation, images):
    maps = {"depth": images[0], "segmentation": torch.ones(8, 8, dtype=torch.long), "edges": images[1]}
    for reward in (depth, segmentation, EdgeConsistency()):
        whole = reward(images, [""] * 3, [maps] * 3).value
        alone = torch.cat([reward(image[None], [""], [maps]).value for image in images])
        torch.testing.assert_close(whole, alone, rtol=1e-5, atol=1e-7)


def test_uncertainty_weighting_of_depth_is_ctrl_us_formula(depth, images):
    others, metadata = images.flip(0), [{"depth": images[0]}] * 3
    first, second = depth.predict(images), depth.predict(others)
    wanted = depth.target(images[0], first)
    u = (first - second).abs()
    expected = (torch.exp(-u) * (first - wanted) ** 2).mean((1, 2)) + 0.1 * u.mean((1, 2))
    found = uncertainty_weighted_loss(depth, images, others, metadata, 0.1)
    torch.testing.assert_close(found, expected)
    assert u.mean() > 1e-3
    certain = uncertainty_weighted_loss(depth, images, images, metadata, 0.1)
    torch.testing.assert_close(certain, -depth(images, [""] * 3, metadata).value)
    assert (uncertainty_weighted_loss(depth, images, others, metadata, 0.0) <= certain).all()


def test_uncertainty_of_classes_is_the_divergence_of_the_second_from_the_first(segmentation, images):
    labels = torch.randint(5, (16, 16), generator=torch.Generator().manual_seed(0))
    labels[:4] = 255
    first, second = segmentation.predict(images), segmentation.predict(images.flip(0))
    p, q = (Categorical(logits=each.movedim(1, -1)) for each in (first, second))
    u = kl_divergence(q, p)
    torch.testing.assert_close(segmentation.disagreement(first, second), u, rtol=1e-4, atol=1e-6)
    loss = -p.log_prob(labels.clamp(max=4)) * torch.exp(-u)
    expected = loss[:, 4:].mean((1, 2)) + u.mean((1, 2))
    leaf = images.clone().requires_grad_()
    found = uncertainty_weighted_loss(segmentation, leaf, images.flip(0), [{"segmentation": labels}] * 3, 1.0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    (gradient,) = torch.autograd.grad(found.sum(), leaf)
    assert gradient.abs().sum() > 0


def test_uncertainty_weighting_refuses_what_does_not_fit(depth, images):
    metadata = [{"depth": images[0]}] * 3
    with pytest.raises(ValueError, match="2 second attempts"):
        uncertainty_weighted_loss(depth, images, images[:2], metadata, 0.1)
    with pytest.raises(ValueError, match="weight is -1"):
        uncertainty_weighted_loss(depth, images, images, metadata, -1)
    with pytest.raises(ValueError, match="must be a path"):
        uncertainty_weighted_loss(depth, images, images, [{}] * 3, 0.1)


@pytest.mark.parametrize("size", [(40, 50), (30, 64), (21, 29)])
def test_preprocessing_equals_the_processors(size):
    from transformers.models.beit.image_processing_pil_beit import BeitImageProcessorPil
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
    from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil

    square, picture = {"height": 32, "width": 32}, next(pictures(1, *size))
    for processor in (
        DPTImageProcessorPil(size=square),
        DPTImageProcessorPil(size=square, keep_aspect_ratio=True, ensure_multiple_of=7, resample=2),
        BitImageProcessorPil(size={"shortest_edge": 30}, crop_size={"height": 28, "width": 28}),
        BeitImageProcessorPil(size=square, crop_size=square, do_center_crop=True),
    ):
        expected = processor(picture, return_tensors="pt")["pixel_values"]
        found = NetworkPreprocessing.from_processor(processor, "here")(media.from_pil(picture))
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    with pytest.raises(ValueError, match="here pads"):
        NetworkPreprocessing.from_processor(DPTImageProcessorPil(do_pad=True, size_divisor=32), "here")


def test_a_network_of_another_kind_is_refused(tmp_path, models, caplog):
    with pytest.raises(ValueError, match="no model that transformers' AutoModelForDepthEstimation builds"):
        DepthConsistency(models["segformer"])
    with caplog.at_level(logging.ERROR), pytest.raises(ValueError, match="builds"):
        SegmentationConsistency(write_dino(tmp_path / "dino"))
