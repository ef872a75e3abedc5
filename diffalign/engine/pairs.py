"""Preference pairs from a policy and a reward: of the samples of each prompt the best against the worst."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from diffalign.data import Judged, Prompt
from diffalign.engine.evaluate import Evaluation, sample_images, score_images
from diffalign.policies import Policy
from diffalign.rewards import Reward

if TYPE_CHECKING:
    from diffalign.config import EvaluationConfig


@dataclass
class LeftOut:
    """Prompts that gave no pair.

    Attributes:
        ties: all of their scores are equal.
        failed: fewer than two of their scores did not fail.
    """

    ties: int = 0
    failed: int = 0


def draw_pairs(
    policy: Policy, prompts: Sequence[Prompt], reward: Reward, settings: EvaluationConfig, seed: int, left_out: LeftOut
) -> Iterator[Judged]:
    """Draws `settings.num_images_per_prompt` images for each prompt, scores them, and gives the best and the worst.

    The images are those of `sample_images`, and stand in a pair in the order of their numbers, so that the place of an
    image says nothing of its score. Of equal scores the first counts.

    Args:
        policy: draws.
        prompts: one pair at the most of each.
        reward: chooses; its scores are of 8-bit pixels.
        settings: how to sample. `batch_size` images at a time, but never less than those of one prompt.
        seed: of the noise.
        left_out: is counted up.
    """
    number = settings.num_images_per_prompt
    at_once = max(1, settings.batch_size // number)
    for start in range(0, len(prompts), at_once):
        few = prompts[start : start + at_once]
        drawn = sample_images(policy, few, seed=seed, **settings.sampling())
        score_images(drawn, {"reward": reward}, device=policy.device, batch_size=len(drawn.prompts))
        for place, prompt in enumerate(few):
            pair = _best_against_worst(drawn, prompt, slice(place * number, (place + 1) * number), left_out)
            if pair is not None:
                yield pair


def _best_against_worst(drawn: Evaluation, prompt: Prompt, rows: slice, left_out: LeftOut) -> Judged | None:
    scores, images = drawn.scores["reward"][rows], drawn.images[rows]
    valid = scores.isfinite().nonzero().flatten()
    if len(valid) < 2:
        left_out.failed += 1
        return None
    best, worst = valid[scores[valid].argmax()], valid[scores[valid].argmin()]
    if scores[best] == scores[worst]:
        left_out.ties += 1
        return None
    both = torch.stack([best, worst]).sort().values
    return Judged(prompt, images[both], (float(scores[both[0]]), float(scores[both[1]])))
