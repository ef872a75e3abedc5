"""Attention kernels, set where they take effect.

diffusers' ``set_attention_backend`` reaches only processors that go through its dispatcher. Those of
UNet2DConditionModel and SD3Transformer2DModel call torch's scaled_dot_product_attention themselves and would ignore it
without a word, so here the choice is made around that call, in which the dispatcher's native backend ends too.
"""

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

KERNELS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
XFORMERS_PROCESSORS = ("AttnProcessor2_0", "JointAttnProcessor2_0")
"""Those of diffusers' oldest attention modules, the only ones that its xformers processors replace."""

SDPA_PROCESSORS = (
    *XFORMERS_PROCESSORS,
    "FluxAttnProcessor",
    "QwenDoubleStreamAttnProcessor2_0",
    "SanaAttnProcessor2_0",
)
LINEAR_PROCESSORS = ("SanaLinearAttnProcessor2_0",)
"""Attention without a softmax, which has no kernel to choose."""


def under_kernel(processor: Any, kernel: SDPBackend) -> Any:
    """A copy of a diffusers attention processor that runs under one kernel of torch's scaled_dot_product_attention.

    The choice sits inside the module, so that it also holds when a checkpointed block is computed again in the
    backward pass. The copy is of a class with the same name and signature, by which diffusers chooses its arguments.
    """
    kind = type(processor)

    @functools.wraps(kind.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel(kernel):
            return kind.__call__(self, *args, **kwargs)

    chosen = copy.copy(processor)
    chosen.__class__ = type(kind.__name__, (kind,), {"__call__": call, "kernel": kernel})
    if hasattr(kind, "_attention_backend"):
        chosen._attention_backend = AttentionBackendName.NATIVE  # which ends in torch's call, whatever was set before
    return chosen


def set_attention(denoiser: Any, backend: str, processors: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Set the attention kernel of a denoiser.

    Args:
        denoiser: a diffusers model with attention processors.
        backend: "auto" (torch chooses), "math", "flash", "efficient", "cudnn", or "xformers".
        processors: the model's own processors by name, to go back to.
        dtype: type of the attention's inputs.

    Raises:
        ValueError: the name is unknown, or the kernel would not take effect or cannot run here.
    """
    if backend not in ("auto", "xformers", *KERNELS):
        raise ValueError(f"attention {backend!r} is unknown: use one of auto, xformers, {', '.join(KERNELS)}")
    if backend != "auto":
        _refuse_unreached(backend, processors)
    if backend in KERNELS:
        _refuse_unavailable(backend, next(denoiser.parameters()).device, dtype)
        kernel = KERNELS[backend]
        denoiser.set_attn_processor({name: under_kernel(p, kernel) for name, p in processors.items()})
        return
    denoiser.set_attn_processor(dict(processors))
    if backend == "xformers":
        _refuse_missing_xformers(next(denoiser.parameters()).device)
        denoiser.enable_xformers_memory_efficient_attention()


def _refuse_unreached(backend: str, processors: Mapping[str, Any]) -> None:
    reached = XFORMERS_PROCESSORS if backend == "xformers" else SDPA_PROCESSORS + LINEAR_PROCESSORS
    others = {type(p).__name__ for p in processors.values()} - set(reached)
    if others:
        raise ValueError(
            f"attention {backend!r} would be ignored by {', '.join(sorted(others))}: use attention 'auto', "
            f"or set processors of {' or '.join(reached)} first"
        )


def _refuse_unavailable(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    trial = torch.zeros(1, 1, 8, 64, device=device, dtype=dtype)
    try:
        with sdpa_kernel(KERNELS[backend]):
            nn.functional.scaled_dot_product_attention(trial, trial, trial)
    except RuntimeError as error:
        raise ValueError(f"attention {backend!r} does not run on {device} in {dtype}: use attention 'auto'") from error


def _refuse_missing_xformers(device: torch.device) -> None:
    from diffusers.utils import is_xformers_available

    if device.type != "cuda" or not is_xformers_available():
        missing = "the denoiser is not on a GPU" if device.type != "cuda" else "it is not installed"
        raise ValueError(f"attention 'xformers' cannot run, {missing}: use attention 'auto', or pip install xformers")
