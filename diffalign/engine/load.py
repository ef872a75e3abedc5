"""From a recipe's `pipeline` section to a policy that is ready to sample."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffalign.policies import Policy
from diffalign.processes import process_state

if TYPE_CHECKING:
    from diffalign.config import PipelineConfig


def load_policy(config: PipelineConfig) -> Policy:
    """Loads the pipeline on this process's device and sets what the recipe asks of it."""
    policy = Policy.from_pretrained(config.path, dtype=config.dtype, revision=config.revision)
    policy.pipe.to(process_state().device)
    policy.set_attention(config.attention)
    if config.max_sequence_length is not None:
        policy.set_max_sequence_length(config.max_sequence_length)
    return policy
