"""The optimiser of a training run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from diffalign.finetune.config import TrainingConfig


def make_optimizer(parameters: Sequence[nn.Parameter], training: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW, in the precision that the settings ask for.

    Raises:
        ValueError: 8-bit AdamW without a GPU or without bitsandbytes.
    """
    kind: type[torch.optim.Optimizer] = torch.optim.AdamW
    if training.optimizer == "adamw_8bit":
        if parameters[0].device.type != "cuda":
            raise ValueError(
                f"optimizer = adamw_8bit needs a GPU, and the adapter is on {parameters[0].device}: use adamw"
            )
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise ValueError("optimizer = adamw_8bit needs bitsandbytes: pip install 'diffalign[gpu]'") from error
        kind = AdamW8bit
    return kind(
        parameters,
        lr=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        weight_decay=training.adam_weight_decay,
        eps=training.adam_epsilon,
    )
