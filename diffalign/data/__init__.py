"""Prompts, from files to steps."""

from diffalign.data.prompts import Prompt, PromptSampler, read_prompts

__all__ = ["Prompt", "PromptSampler", "read_prompts"]
