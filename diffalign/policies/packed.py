"""Rectified flows whose transformer reads the latent packed 2 x 2 into tokens."""

from abc import abstractmethod

import numpy as np
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from diffalign.laws import Schedule
from diffalign.policies.condition import Condition
from diffalign.policies.kinds import FlowPolicy
from diffalign.policies.lora import JOINT_ATTENTION
from diffalign.policies.tables import as_flow_euler, read_flow


class PackedFlow(FlowPolicy):
    """What FLUX.1 and Qwen-Image share. States are unpacked; packing is this class's own business."""

    attention_modules = JOINT_ATTENTION
    patch_size = 2

    @property
    def latent_channels(self) -> int:
        """Channels of the unpacked state."""
        return self.denoiser.config.in_channels // 4

    @property
    def sample_size(self) -> int:
        """The latent's side by default; the transformer has none of its own."""
        return self.pipe.default_sample_size

    def schedule(self, num_inference_steps: int, height: int | None = None, width: int | None = None) -> Schedule:
        """Return the sigmas, shifted by the number of tokens where the scheduler shifts dynamically."""
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        _, h, w = self.latent_shape(height, width)
        config = as_flow_euler(self.pipe.scheduler).config
        keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        mu = calculate_shift(h * w // 4, *(config[key] for key in keys))
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        return read_flow(self.pipe.scheduler, num_inference_steps, mu, sigmas)

    def evaluate(self, x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """Pack, evaluate the transformer and unpack; a token holds its 2 x 2 elements channel by channel."""
        sides = x.shape[-2] // 2, x.shape[-1] // 2
        tokens = pixel_unshuffle(x.to(self.dtype), 2).flatten(2).transpose(1, 2)
        output = self.evaluate_tokens(tokens, sides, timestep / 1000, condition)
        return pixel_shuffle(output.transpose(1, 2).unflatten(2, sides), 2)

    @abstractmethod
    def evaluate_tokens(self, tokens: Tensor, sides: tuple[int, int], time: Tensor, condition: Condition) -> Tensor:
        """Evaluate the transformer on (B, h w, 4 C) tokens of an h x w grid, at times (B,) in [0, 1]."""
