"""Teach a text encoder to read before it meets pictures, as CLIP's was: denoisers then use it frozen."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import CLIPTokenizer

from diffalign.zoo import training
from diffalign.zoo.symbols import Reader, bits
from diffalign.zoo.text import WIDTH, tokenize
from diffalign.zoo.world import sample_scene, say

SCHEDULE = training.Schedule(steps=600, learning_rate=2e-3, warmup=100, decay=400)
BATCH = 64

Encode = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""From ids (B, LENGTH) to the words (B, LENGTH, WIDTH) and the pooled caption (B, WIDTH) that a denoiser will see."""


def states(encoder: nn.Module) -> Encode:
    """What most readers take of a CLIP text encoder: its last hidden state and its pooled state."""

    def encode(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = encoder(input_ids=ids)
        return output.last_hidden_state, output.pooler_output

    return encode


def teach(encoder: nn.Module, encode: Encode, tokenizer: CLIPTokenizer, folder: Path, seed: int) -> float:
    """Train `encoder` until the facts of a caption can be read off its last words and off its pooled state.

    Captions are causal: only what follows the last word knows them all. Returns the seconds; freezes the encoder.
    """
    torch.manual_seed(seed)
    pupil = nn.ModuleDict({"encoder": encoder, "words": Reader(WIDTH), "pooled": Reader(WIDTH)})
    pupil.train()

    def loss(batch: training.Batch) -> dict[str, torch.Tensor]:
        scenes = [sample_scene(batch.rng, "train") for _ in range(BATCH)]
        words, pooled = encode(tokenize(tokenizer, [say(scene, batch.rng) for scene in scenes]))
        target = bits(scenes)
        # The last four positions follow the end of every caption.
        terms = {
            "words": pupil["words"].loss(words[:, -4:], target[:, None]),
            "pooled": pupil["pooled"].loss(pooled, target),
        }
        return {"loss": terms["words"] + terms["pooled"], **terms}

    seconds = training.train(pupil, loss, SCHEDULE, folder, seed=seed, checkpoint_every=500, log_every=50)
    encoder.requires_grad_(False).eval()
    return seconds
