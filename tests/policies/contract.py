"""The families of the contract, and how a policy and its pipeline draw from the same noise."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from diffalign.laws import DDIM, Consistency, FlowODE, FlowSDE, Law, Schedule
from diffalign.noise import normal
from diffalign.policies import Condition, Policy, tiny, tiny_families
from diffalign.rollout import Plan, Trajectory, differentiable_rollout, rollout

PROMPTS = ["a bad dog", "a fine lake"]
ROWS = [(0, 0), (1, 0)]
STEPS = 3


@dataclass(frozen=True)
class Family:
    """What a contract needs to know of a family beside its pipeline."""

    build: Callable[..., Any]
    own: Law  # the pipeline's
    sde: Law
    guidance: tuple[float, ...] = (3.0, 1.0)
    call: dict[str, Any] = field(default_factory=dict)
    guidance_name: str = "guidance_scale"
    bound: float = 5e-6
    start: float = 1.0  # what the pipeline's initial latents are multiplied by to start from the policy's state
    plain_lora: bool = True
    idle: tuple[str, ...] = ()  # layers whose output the model throws away
    square: tuple[int, int] = (16, 16)
    wide: tuple[int, int] = (16, 24)


FLOW, DIFFUSION = (FlowODE(), FlowSDE()), (DDIM(0.0), DDIM(1.0))
# Euler starts from noise times its largest sigma, which is not quite the noise of a diffusion state.
EULER = 1 / (1 - float(tiny_families.tiny_sd_turbo().scheduler.alphas_cumprod[-1])) ** 0.5
EXACT_SIZE = {"use_resolution_binning": False}
PIXART = EXACT_SIZE | {"clean_caption": False}
QWEN = {"negative_prompt": ["", ""]}
LAST_TEXT = ("blocks.1.attn.add_q_proj", "blocks.1.attn.to_add_out")
FAMILIES = {
    "SD 1 / 2": Family(tiny.tiny_sd, *DIFFUSION),
    "SD-Turbo": Family(tiny_families.tiny_sd_turbo, *DIFFUSION, guidance=(0.0,), start=EULER, bound=2e-5),
    "LCM": Family(tiny_families.tiny_lcm, Consistency(), Consistency(), guidance=(8.5, 3.0), bound=2e-5),
    "SDXL": Family(tiny_families.tiny_sdxl, *DIFFUSION),
    "SDXL-Turbo": Family(tiny_families.tiny_sdxl_turbo, *[DDIM(1.0)] * 2, guidance=(0.0,), start=EULER, bound=2e-5),
    "SD 3": Family(tiny.tiny_sd3, *FLOW, idle=("blocks.1.attn.add_q_proj",)),
    "PixArt-alpha": Family(tiny_families.tiny_pixart_alpha, *DIFFUSION, call=PIXART, plain_lora=False),
    "PixArt-Sigma": Family(tiny_families.tiny_pixart_sigma, *DIFFUSION, call=PIXART, plain_lora=False),
    "Sana": Family(tiny_families.tiny_sana, *FLOW, call=EXACT_SIZE, square=(32, 32), wide=(32, 64)),
    "FLUX.1-dev": Family(tiny_families.tiny_flux, *FLOW, guidance=(3.5, 1.0)),
    "FLUX.1-schnell": Family(tiny_families.tiny_schnell, *FLOW, guidance=(0.0,)),
    "Qwen-Image": Family(tiny_families.tiny_qwen, *FLOW, call=QWEN, guidance_name="true_cfg_scale", idle=LAST_TEXT),
}


def noise(policy: Policy, size: tuple[int, int]) -> Tensor:
    return normal(policy.latent_shape(*size), seed=3, purpose="initial", rows=ROWS)


@contextmanager
def addressed_noise() -> Iterator[None]:
    """Schedulers that add noise draw that of step 0, 1, ... of a rollout."""
    steps = count()

    def draw(shape: torch.Size, **_: Any) -> Tensor:
        return normal(shape[1:], seed=3, purpose="step", rows=ROWS[: shape[0]], step=next(steps))

    schedulers = "diffusers.schedulers.scheduling_"
    with (
        patch(f"{schedulers}lcm.randn_tensor", draw),
        patch(f"{schedulers}euler_ancestral_discrete.randn_tensor", draw),
    ):
        yield


def drawn(pipe: Any, family: Family, guidance: float, size: tuple[int, int]) -> Tensor:
    """The latents that the pipeline itself draws, unpacked by its own function."""
    latents = _call(pipe, family, guidance, size, STEPS, "latent")
    if hasattr(pipe, "_unpack_latents"):
        latents = pipe._unpack_latents(latents, *size, pipe.vae_scale_factor).squeeze(2)
    return latents


def pixels(pipe: Any, family: Family) -> Tensor:
    """The image that the pipeline draws in two steps."""
    return _call(pipe, family, family.guidance[0], family.square, 2, "pt")


def _call(pipe: Any, family: Family, guidance: float, size: tuple[int, int], steps: int, output_type: str) -> Tensor:
    height, width = size
    x = family.start * noise(Policy.wrap(pipe), size)
    latents = pipe._pack_latents(x, *x.shape) if hasattr(pipe, "_pack_latents") else x
    settings = {"num_inference_steps": steps, family.guidance_name: guidance, "height": height, "width": width}
    with addressed_noise():
        return pipe(PROMPTS, latents=latents, output_type=output_type, **(settings | family.call)).images


@dataclass
class Run:
    """A policy with its conditions and its chain."""

    family: Family
    policy: Policy
    size: tuple[int, int]
    condition: Condition
    schedule: Schedule

    @classmethod
    def of(cls, family: Family, pipe: Any, size: tuple[int, int] | None = None, lora: bool = False) -> "Run":
        size = size or family.square
        policy = Policy.wrap(pipe)
        if lora:
            policy.add_lora(rank=2, alpha=3)
            random = torch.Generator().manual_seed(0)
            for parameter in policy.trainable().values():
                parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=random))
        return cls(family, policy, size, policy.encode(PROMPTS), policy.schedule(STEPS, *size))

    @classmethod
    def short(cls, family: Family, pipe: Any) -> "Run":
        """With an adapter, and two steps: enough for gradients."""
        run = cls.of(family, pipe, lora=True)
        run.schedule = run.policy.schedule(2, *family.square)
        return run

    def arguments(self, guidance: float | None = None) -> dict[str, Any]:
        scale = self.family.guidance[0] if guidance is None else guidance
        height, width = self.size
        return {"rows": ROWS, "seed": 3, "guidance_scale": scale, "height": height, "width": width}

    def rollout(self, law: Law, guidance: float | None = None, **record: Any) -> Trajectory:
        return rollout(self.policy, self.condition, law, self.schedule, **self.arguments(guidance), **record)

    def graded(self) -> Tensor:
        """Latents with a graph through every step."""
        plan = Plan(tuple(range(len(self.schedule))))
        chain = (self.policy, self.condition, self.family.own, self.schedule)
        return differentiable_rollout(*chain, plan=plan, checkpoint=False, **self.arguments()).latents

    def reward(self) -> Tensor:
        """A function of the pixels, with a graph through every step."""
        images = self.policy.decode(self.graded())
        return (images - torch.linspace(0, 1, images.shape[-1])).square().sum()


def differentiate(value: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Gradients, zero where the value does not depend on a parameter."""
    return list(torch.autograd.grad(value, parameters, materialize_grads=True))


def relative(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    assert torch.isfinite(expected).all()
    return ((found - expected).abs().max() / expected.abs().max()).item()
