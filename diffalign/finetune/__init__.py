"""Fine-tuning by reward: one file a method, over the shared loop in `trainer.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffalign.finetune.config import METHODS, RewardBackpropConfig, TrainingConfig
from diffalign.finetune.noisy_reward_config import NoisyRewardConfig

if TYPE_CHECKING:
    from diffalign.finetune.reward_backprop import RewardBackprop
    from diffalign.finetune.trainer import TRAINERS, History, Trainer

__all__ = [
    "METHODS",
    "TRAINERS",
    "History",
    "NoisyRewardConfig",
    "RewardBackprop",
    "RewardBackpropConfig",
    "Trainer",
    "TrainingConfig",
    "trainer_class",
]


def __getattr__(name: str) -> Any:
    # Lazy, so that recipes are validated without importing torch.
    if name == "RewardBackprop":
        from diffalign.finetune.reward_backprop import RewardBackprop

        return RewardBackprop
    if name in ("TRAINERS", "Trainer", "History"):
        from diffalign.finetune import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def trainer_class(method: str) -> type[Trainer]:
    """The trainer of a method by its recipe name, one of `METHODS`; UnknownName where none is registered."""
    from diffalign.finetune import reward_backprop  # noqa: F401  registers its own
    from diffalign.finetune.trainer import TRAINERS

    return TRAINERS.get(method)
