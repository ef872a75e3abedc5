"""Qwen-Image."""

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pixel_unshuffle

from diffalign.policies.base import POLICIES
from diffalign.policies.condition import Condition
from diffalign.policies.packed import PackedFlow


@POLICIES.register("qwen-image")
class QwenImage(PackedFlow):
    """``QwenImagePipeline``: a joint-attention transformer with Qwen2.5-VL's reading of the prompt.

    The guidance scale is the pipeline's ``true_cfg_scale``, away from the empty prompt; the result is rescaled, token
    by token, to the norm of the conditional branch. Both branches are padded to one length and evaluated as one batch,
    where the pipeline evaluates one after the other.

    Departures from the pipeline: without ``negative_prompt`` it does not guide at all; here the guidance scale decides.
    """

    pipeline_class = "QwenImagePipeline"
    max_sequence_length = 512  # of the prompt, the pipeline's default

    def check(self) -> None:
        """Refuse schedulers that cannot be read, and transformers that need more than this pipeline's prompt."""
        super().check()
        config = self.denoiser.config
        for setting in ("guidance_embeds", "zero_cond_t", "use_additional_t_cond"):
            if config[setting]:
                raise ValueError(
                    f"this transformer has {setting}=True, which no text-to-image checkpoint of Qwen-Image has: use "
                    "one such as Qwen/Qwen-Image"
                )

    def encode_one(self, prompt: str) -> Condition:
        """Return ``prompt_embeds`` (1, tokens, width) and ``prompt_embeds_mask`` (1, tokens), as long as the prompt."""
        embeds, _ = self.pipe.encode_prompt([prompt], self.device, max_sequence_length=self.max_sequence_length)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        return Condition({"prompt_embeds": embeds, "prompt_embeds_mask": mask})

    def combine(self, unconditional: Tensor, conditional: Tensor, guidance_scale: float) -> Tensor:
        """Guide, and give each token the norm that it has under the prompt alone."""
        guided = super().combine(unconditional, conditional, guidance_scale)
        return guided * interpolate(token_norm(conditional) / token_norm(guided), scale_factor=2)

    def evaluate_tokens(self, tokens: Tensor, sides: tuple[int, int], time: Tensor, condition: Condition) -> Tensor:
        """Evaluate the transformer."""
        return self.called(
            hidden_states=tokens,
            timestep=time,
            encoder_hidden_states=condition.tensors["prompt_embeds"].to(self.dtype),
            encoder_hidden_states_mask=condition.tensors["prompt_embeds_mask"],
            img_shapes=[[(1, *sides)]] * len(tokens),
            return_dict=False,
        )[0]

    def unscale(self, latents: Tensor) -> Tensor:
        """Undo the normalisation of each channel, and make the image a video of one frame, (B, C, 1, h, w)."""
        config = self.pipe.vae.config
        std, mean = latents.new_tensor(config.latents_std), latents.new_tensor(config.latents_mean)
        return (latents * std.view(-1, 1, 1) + mean.view(-1, 1, 1)).unsqueeze(2)

    def decoder_output(self, latents: Tensor) -> Tensor:
        """Decode the one frame."""
        return super().decoder_output(latents)[:, :, 0]


def token_norm(x: Tensor) -> Tensor:
    """Return the norm of every 2 x 2 token over its elements, (B, C, h, w) -> (B, 1, h / 2, w / 2)."""
    return pixel_unshuffle(x, 2).norm(dim=1, keepdim=True)
