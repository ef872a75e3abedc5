"""Prompts and preference pairs, from files to steps."""

from diffalign.data.cache import TensorCache
from diffalign.data.captioned import Captioned, read_captioned
from diffalign.data.pair import SIDES, Pair, Side, open_side
from diffalign.data.pairs import read_pairs
from diffalign.data.pick_a_pic import Judged, write_pairs
from diffalign.data.picture import content_digest, open_fitted
from diffalign.data.prompts import Prompt, PromptSampler, read_prompts

__all__ = [
    "SIDES",
    "Captioned",
    "Judged",
    "Pair",
    "Prompt",
    "PromptSampler",
    "Side",
    "TensorCache",
    "content_digest",
    "open_fitted",
    "open_side",
    "read_captioned",
    "read_pairs",
    "read_prompts",
    "write_pairs",
]
