"""Word-level tokenizers of the shapes world: every word of the grammar is one token of a real CLIP or T5 tokenizer."""

import itertools
import string
from collections import Counter
from collections.abc import Sequence

import torch
from transformers import CLIPTextConfig, CLIPTokenizer, T5Tokenizer

from diffalign.zoo.world import COLORS, RELATIONS, SHAPES, SIZES

LENGTH = 16
"""Tokens of a padded caption; the longest caption of the grammar takes 12 with its start and end."""

WIDTH = 128  # of every text encoder

WORDS = sorted({"a", "an", *COLORS, *SHAPES, *SIZES, *(word for r in RELATIONS for word in r.split())})


def _merges() -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first and ties by the alphabet, until every word is one piece.

    Not the trainer of the tokenizers library: it orders letters by a hash with a new seed in every process, so that
    two processes that build "the same" tokenizer disagree on ids.
    """
    words = [[*word[:-1], word[-1] + "</w>"] for word in WORDS]
    merges = []
    while pairs := Counter(pair for word in words for pair in itertools.pairwise(word)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = [_merged(word, best) for word in words]
    return merges


def _merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for piece in word:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def clip_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose merges join each word of the grammar; other words fall apart into letters.

    The end-of-text token has the highest id, so that pooling by argmax and by id find the same place.
    """
    merges = _merges()
    letters = list(string.ascii_lowercase)
    tokens = [*letters, *(f"{c}</w>" for c in letters), *("".join(pair) for pair in merges)]
    vocab = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH)


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> torch.Tensor:
    """Ids (B, LENGTH)."""
    return torch.tensor(tokenizer(list(captions), padding="max_length").input_ids)


def text_config(tokenizer: CLIPTokenizer, projection: int = WIDTH) -> CLIPTextConfig:
    """Every text encoder of the zoo: three layers of width 128."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=projection,
        max_position_embeddings=LENGTH,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def t5_tokenizer() -> T5Tokenizer:
    """A unigram tokenizer with one piece a word."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -10.0), *((f"▁{word}", -1.0) for word in WORDS)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=LENGTH)
