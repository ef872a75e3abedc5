"""Prompts and preference pairs, from files to steps."""

from diffalign.data.pairs import Judged, Pair, open_pair, read_pairs, write_pairs
from diffalign.data.prompts import Prompt, PromptSampler, read_prompts

__all__ = ["Judged", "Pair", "Prompt", "PromptSampler", "open_pair", "read_pairs", "read_prompts", "write_pairs"]
