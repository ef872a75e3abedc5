"""Samples of a policy and what rewards say of them: the choices that a noise-aware reward learns from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign import media
from diffalign.data import Prompt
from diffalign.finetune.noisy_reward_config import NoisyRewardConfig
from diffalign.laws import default_law
from diffalign.policies import Policy
from diffalign.rewards import Reward
from diffalign.rollout import rollout


@torch.no_grad()
def sample_and_score(
    policy: Policy,
    prompts: Sequence[Prompt],
    rewards: Sequence[Reward],
    config: NoisyRewardConfig,
    *,
    group_size: int,
    seed: int,
) -> dict[str, Tensor]:
    """Draws `group_size` samples of each prompt, from noise addressed by seed, prompt id and number, and scores them.

    Returns:
        latents (P, G, C, h, w) in half precision, and values (P, G, K) of the 8-bit images that a user would save, NaN
        where a score failed; both on the host.
    """
    schedule = policy.schedule(config.num_inference_steps)
    named = [(prompt, i) for prompt in prompts for i in range(group_size)]
    taken = rollout(
        policy,
        policy.encode([prompt.text for prompt, _ in named]),
        default_law(schedule.kind, config.eta),
        schedule,
        rows=[(prompt.id, i) for prompt, i in named],
        seed=seed,
        guidance_scale=config.guidance_scale,
    )
    latents = taken.latents.half()
    images = media.from_uint8(media.to_uint8(policy.decode(latents.to(policy.state_dtype))))
    texts, metadata = [prompt.text for prompt, _ in named], [prompt.metadata for prompt, _ in named]
    scores = [reward(images, texts, metadata) for reward in rewards]
    values = torch.stack([score.value.masked_fill(~score.valid, torch.nan).float() for score in scores], dim=1)
    return {
        "latents": latents.cpu().unflatten(0, (len(prompts), group_size)),
        "values": values.cpu().unflatten(0, (len(prompts), group_size)),
    }
