"""From latents to pixels: the pipeline's VAE, and what makes it smaller at real size."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.laws.prediction import at_least_fp32
from diffalign.media.pixels import straight_through_clamp
from diffalign.registry import locate


class Decoding:
    """The decoder of a policy."""

    pipe: Any
    latent_channels: Any
    tiny_decoder: nn.Module | None = None
    """Decodes in place of the VAE wherever the latents have a gradient; see :meth:`set_tiny_decoder`."""

    @abstractmethod
    def unscale(self, latents: Tensor) -> Tensor:
        """Return what the VAE reads."""

    def decode(self, latents: Tensor, micro_batch_size: int | None = None) -> Tensor:
        """Decode latents to pixels, (B, C, h, w) -> (B, 3, H, W) in [0, 1], fp32.

        The clamp passes gradients straight through, so that saturated pixels still learn.

        Args:
            latents: final states.
            micro_batch_size: images decoded at once; it bounds memory and changes nothing else.
        """
        tiny = self.tiny_decoder is not None and latents.requires_grad and torch.is_grad_enabled()
        one = self._decode_tiny if tiny else self._decode
        images = torch.cat([at_least_fp32(one(chunk)) for chunk in latents.split(micro_batch_size or len(latents))])
        return straight_through_clamp(images * 0.5 + 0.5)

    def _decode(self, latents: Tensor) -> Tensor:
        return self.decoder_output(self.unscale(latents).to(self.pipe.vae.dtype))

    def _decode_tiny(self, latents: Tensor) -> Tensor:
        tiny: Any = self.tiny_decoder
        return tiny.decode(unscaled(latents, tiny.config).to(tiny.dtype), return_dict=False)[0]

    def decoder_output(self, latents: Tensor) -> Tensor:
        """Run the VAE's decoder on what it reads, (B, C, h, w) -> (B, 3, H, W) in about [-1, 1]."""
        return self.pipe.vae.decode(latents, return_dict=False)[0]

    def set_tiny_decoder(self, path: Any) -> None:
        """Decode with diffusers' AutoencoderTiny (TAESD and its kin) wherever the latents have a gradient.

        The gradient then costs a small part of the memory, and is that of slightly other pixels. Images without a
        gradient, which are those of every evaluation, still come from the pipeline's own VAE.

        Args:
            path: a folder or a hub id, such as ``madebyollin/taesd`` for Stable Diffusion 1.x and 2.x.

        Raises:
            ValueError: it was made for other latents than this pipeline's.
        """
        from diffusers import AutoencoderTiny

        vae = self.pipe.vae
        tiny = AutoencoderTiny.from_pretrained(locate(path), use_safetensors=True).eval().requires_grad_(False)
        tiny = tiny.to(vae.device, vae.dtype)
        channels, factor = tiny.config.latent_channels, 2 ** (len(tiny.config.decoder_block_out_channels) - 1)
        if (channels, factor) != (self.latent_channels, self.pipe.vae_scale_factor):
            raise ValueError(
                f"tiny_decoder {path} reads latents of {channels} channels at 1/{factor} of the image's side, and this "
                f"pipeline's have {self.latent_channels} at 1/{self.pipe.vae_scale_factor}: use the one made for it"
            )
        self.tiny_decoder = tiny


def unscaled(latents: Tensor, config: Any) -> Tensor:
    """Undo an autoencoder's scale and, where its config has one, its shift."""
    return latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
