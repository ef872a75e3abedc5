"""Digits: scikit-learn's, smoothed by a kernel, so that the denoiser is exact and rejection gives exact samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from diffalign.laws import DDIM, Schedule
from diffalign.search.space import Rows
from tests.search.problems import Toy

WIDTH = 0.15


@cache
def data() -> tuple[Tensor, Tensor, Tensor]:
    """(images (1797, 64) in [-1, 1], weights (64, 10), biases (10,)) of a logistic regression on them."""
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression

    images, labels = load_digits(return_X_y=True)
    images = images / 8 - 1
    model = LogisticRegression(max_iter=1000).fit(images, labels)
    return tuple(
        torch.from_numpy(np.asarray(part, dtype=np.float64)) for part in (images, model.coef_.T, model.intercept_)
    )


def cosine_levels(steps: int) -> Schedule:
    """alpha = cos, sigma = sin of equally spaced angles."""
    angle = torch.linspace(1, 0, steps + 1, dtype=torch.float64) * math.pi / 2
    alpha, sigma = angle.cos().clamp(min=1e-3), angle.sin()
    return Schedule("diffusion", angle[:-1], alpha, sigma, alpha[1:], sigma[1:])


class Digits(Toy):
    """p is a kernel density estimate of the digits; r = max over some classes of log p(class | x), at most 0."""

    def __init__(self, classes: Sequence[int], seeds: Sequence[int] = (0,), steps: int = 50) -> None:
        super().__init__(DDIM(1.0), cosine_levels(steps), (64,), "sample", ids=list(seeds), dtype=torch.float64)
        self.images, self.weights, self.biases = data()
        self.classes = list(classes)

    def evaluate(self, rows: Rows) -> Tensor:
        """The exact posterior mean of x_0: a softmax over the digits."""
        level = self.schedule.level(rows.steps)
        alpha, sigma = level.alpha[:, None], level.sigma[:, None]
        variance = alpha**2 * WIDTH**2 + sigma**2
        square = rows.x.square().sum(1, keepdim=True) - 2 * alpha * rows.x @ self.images.T
        square = square + alpha**2 * self.images.square().sum(1)
        centre = (-0.5 * square / variance).softmax(1) @ self.images
        return centre + alpha * WIDTH**2 / variance * (rows.x - alpha * centre)

    def rate(self, results: Tensor, prompts: Tensor) -> Tensor:
        """r (B,), counted."""
        values = (results @ self.weights + self.biases).log_softmax(1)[:, self.classes].amax(1)
        self.count_scores(values, prompts)
        return values
