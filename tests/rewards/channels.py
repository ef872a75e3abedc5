"""Rewards that read one colour channel of images of one pixel, so that every score and gradient is known."""

import torch

from diffalign.rewards import as_reward

A, B, C = "red", "green", "blue"


def channel(index, *, scale=1.0, shift=0.0, name=None):
    """r = scale * channel + shift."""
    return as_reward(lambda i, p, m: scale * i[:, index].mean((1, 2)) + shift, name=name or (A, B, C)[index])


def fails_on(index, prompt):
    """A channel's reward that is NaN for one prompt."""
    factor = {prompt: float("nan")}
    return as_reward(
        lambda i, p, m: i[:, index].mean((1, 2)) * i.new_tensor([factor.get(text, 1.0) for text in p]),
        name=(A, B, C)[index],
    )


def pixels(count, seed=0, dtype=torch.float64):
    """(count, 3, 1, 1), away from 0 and 1 so that differences fit."""
    colours = torch.rand(count, 3, 1, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (0.1 + 0.8 * colours).to(dtype)


def table(images):
    """(K = 3, N): what the three channels score."""
    return images[:, :, 0, 0].T


def prompts(count):
    return [f"prompt {i}" for i in range(count)]
