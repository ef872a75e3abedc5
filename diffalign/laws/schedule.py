"""Noise levels and tables of them: x_t = alpha_t x_0 + sigma_t noise."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

ScheduleKind = Literal["diffusion", "flow"]


@dataclass(frozen=True, eq=False)
class Level:
    """Where each row of a batch stands: x = alpha x_0 + sigma noise, each of shape (B,).

    Rows may stand at different levels, as the nodes of a tree or the particles of a filter do.

    Attributes:
        alpha: (B,) signal coefficient.
        sigma: (B,) noise coefficient.
        timestep: (B,) what the network is told.
    """

    alpha: Tensor
    sigma: Tensor
    timestep: Tensor

    def __len__(self) -> int:
        return len(self.alpha)

    def expand(self, batch_size: int) -> "Level":
        """Repeat a level of one row for a batch, without a copy."""
        return Level(self.alpha.expand(batch_size), self.sigma.expand(batch_size), self.timestep.expand(batch_size))

    def rows(self, index: Tensor | slice) -> "Level":
        """Select rows."""
        return Level(self.alpha[index], self.sigma[index], self.timestep[index])


@dataclass(frozen=True, eq=False)
class Schedule:
    """The levels of a chain of N steps, as float64 tables on the host.

    Step ``i`` takes a state from ``level(i)`` to ``target(i)``, which usually equals ``level(i + 1)``. The two differ
    where the number of steps does not divide that of the training timesteps: diffusers' DDIM then steps by a fixed
    stride while the next evaluation is at a rounded timestep, and parity with it needs both.

    Attributes:
        kind: "diffusion" (alpha^2 + sigma^2 = 1) or "flow" (alpha + sigma = 1).
        timesteps: (N,) what the network is told at each evaluation.
        alpha: (N + 1,) signal coefficients of the evaluations, and of the result.
        sigma: (N + 1,) noise coefficients of the evaluations, and of the result.
        target_alpha: (N,) signal coefficient that each step leads to.
        target_sigma: (N,) noise coefficient that each step leads to.
    """

    kind: ScheduleKind
    timesteps: Tensor
    alpha: Tensor
    sigma: Tensor
    target_alpha: Tensor
    target_sigma: Tensor

    def __len__(self) -> int:
        return len(self.timesteps)

    def level(self, i: int | Tensor, device: torch.device | str = "cpu") -> Level:
        """Return the level of evaluation ``i`` (0..N, where N is the result, with timestep 0).

        Args:
            i: one index, or a host LongTensor (B,) with an index for each row.
            device: where the level goes. It is float64 there, or float32 where the device has no float64.
        """
        index = torch.as_tensor(i).reshape(-1)
        timesteps = torch.cat([self.timesteps, self.timesteps.new_zeros(1)])
        return _to(Level(self.alpha[index], self.sigma[index], timesteps[index]), device)

    def target(self, i: int | Tensor, device: torch.device | str = "cpu") -> Level:
        """Return the level that step ``i`` (0..N-1) leads to; indices and device as in :meth:`level`."""
        index = torch.as_tensor(i).reshape(-1)
        timesteps = torch.cat([self.timesteps, self.timesteps.new_zeros(1)])
        return _to(Level(self.target_alpha[index], self.target_sigma[index], timesteps[index + 1]), device)


def diffusion_schedule(
    alphas_cumprod: Tensor, timesteps: Tensor, step_size: int | None, final_alpha_cumprod: float | Tensor
) -> Schedule:
    """Build the schedule of a variance-preserving diffusion from the tables of a diffusers scheduler.

    Args:
        alphas_cumprod: (T,) cumulative products of the training schedule.
        timesteps: (N,) integer timesteps of the evaluations, descending.
        step_size: stride of a step; step i leads to ``timesteps[i] - step_size``, as in diffusers' DDIM. None: it leads
            to ``timesteps[i + 1]``, as in its DDPM, LCM and Euler schedulers.
        final_alpha_cumprod: cumulative product of the level before timestep 0.

    Returns:
        The schedule, of kind "diffusion".

    Raises:
        ValueError: a timestep lies outside the training schedule.
    """
    table = alphas_cumprod.detach().cpu().double()
    at = timesteps.detach().cpu().long()
    if at.max() >= len(table):
        raise ValueError(f"timestep {int(at.max())} is outside the training schedule of {len(table)}: take fewer steps")
    to = torch.cat([at[1:], at.new_tensor([-1])]) if step_size is None else at - step_size
    final = torch.as_tensor(final_alpha_cumprod).detach().cpu().double()
    evaluated = table[at]
    reached = torch.where(to >= 0, table[to.clamp(min=0)], final)
    levels = torch.cat([evaluated, reached[-1:]])
    return Schedule(
        kind="diffusion",
        timesteps=at.double(),
        alpha=levels.sqrt(),
        sigma=(1 - levels).sqrt(),
        target_alpha=reached.sqrt(),
        target_sigma=(1 - reached).sqrt(),
    )


def flow_schedule(sigmas: Tensor, timesteps: Tensor) -> Schedule:
    """Build the schedule of a rectified flow, x_s = (1 - s) x_0 + s noise.

    Args:
        sigmas: (N + 1,) noise levels, descending, the last one that of the result.
        timesteps: (N,) what the network is told at each evaluation.

    Returns:
        The schedule, of kind "flow".
    """
    sigma = sigmas.detach().cpu().double()
    alpha = 1 - sigma
    return Schedule(
        kind="flow",
        timesteps=timesteps.detach().cpu().double(),
        alpha=alpha,
        sigma=sigma,
        target_alpha=alpha[1:],
        target_sigma=sigma[1:],
    )


def _to(level: Level, device: torch.device | str) -> Level:
    device = torch.device(device)
    dtype = torch.float32 if device.type == "mps" else torch.float64
    moved = [t.to(device=device, dtype=dtype, non_blocking=True) for t in (level.alpha, level.sigma, level.timestep)]
    return Level(*moved)
