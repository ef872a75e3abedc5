"""Sana."""

import inspect
from typing import Any

from torch import Tensor

from diffalign.policies.base import POLICIES
from diffalign.policies.condition import Condition
from diffalign.policies.kinds import FlowPolicy


@POLICIES.register("sana")
class Sana(FlowPolicy):
    """``SanaPipeline``: a linear-attention transformer over a rectified flow, with Gemma's reading of the prompt.

    Prompts follow the pipeline's own instruction to Gemma; the empty prompt that it guides away from does not.

    Departures from the pipeline: its DPM-Solver is read as Euler with the same shift, an image has the size that is
    asked for (``use_resolution_binning=False``), guidance is combined in fp32.
    """

    pipeline_class = "SanaPipeline"
    attention_modules = ("to_q", "to_k", "to_v", "to_out.0")

    max_sequence_length = 300  # of Gemma after the instruction, the pipeline's default

    def check(self) -> None:
        """Refuse schedulers that cannot be read, and distilled transformers."""
        if self.denoiser.config.guidance_embeds:
            raise ValueError(
                "this transformer embeds the guidance scale (guidance_embeds=True, as Sana-Sprint), which SanaPipeline "
                "does not give it: use a Sana checkpoint"
            )
        super().check()

    def encode_one(self, prompt: str) -> Condition:
        """Return ``prompt_embeds`` (1, tokens, width) and ``prompt_attention_mask`` (1, tokens)."""
        call = inspect.signature(type(self.pipe).__call__).parameters
        return self._encode(prompt, call["complex_human_instruction"].default)

    def encode_unconditional(self) -> Condition:
        """Return the empty prompt without the instruction."""
        return self._encode("", None)

    def _encode(self, prompt: str, instruction: list[str] | None) -> Condition:
        settings: dict[str, Any] = {"device": self.device, "complex_human_instruction": instruction}
        settings["max_sequence_length"] = self.max_sequence_length
        embeds, mask, _, _ = self.pipe.encode_prompt([prompt], False, **settings)
        return Condition({"prompt_embeds": embeds, "prompt_attention_mask": mask})

    def evaluate(self, x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """Evaluate the transformer; a variance that it learned is left out."""
        output = self.called(
            x.to(self.dtype),
            encoder_hidden_states=condition.tensors["prompt_embeds"].to(self.dtype),
            encoder_attention_mask=condition.tensors["prompt_attention_mask"],
            timestep=timestep * self.denoiser.config.timestep_scale,
            return_dict=False,
        )[0]
        return output[:, : x.shape[1]]
