"""One process among those that a launcher started."""

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def process_state() -> PartialState:
    """Rank, world size and device of this process; the group of processes is joined by the first call.

    accelerate takes processes on a machine without an accelerator for single ones, unless its launcher told them that
    they train on the CPU: several started by torchrun would each train alone and write to one folder.
    """
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
