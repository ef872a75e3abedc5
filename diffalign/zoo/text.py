"""Word-level tokenizers of the shapes world: every word of the grammar is one token of a real CLIP or T5 tokenizer."""

import json

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5Tokenizer

from diffalign.zoo.world import COLORS, RELATIONS, SHAPES, SIZES

LENGTH = 16
"""Tokens of a padded caption; the longest caption of the grammar takes 12 with its start and end."""

WORDS = sorted({"a", "an", *COLORS, *SHAPES, *SIZES, *(word for r in RELATIONS for word in r.split())})


def clip_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose merges join each word of the grammar; other words fall apart into letters.

    The end-of-text token has the highest id, so that pooling by argmax and by id find the same place.
    """
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    trainer = trainers.BpeTrainer(
        vocab_size=1000, min_frequency=0, end_of_word_suffix="</w>", initial_alphabet=letters, show_progress=False
    )
    # Every word 32 times and every letter once: letters are in the vocabulary as ends of words too.
    bpe.train_from_iterator([*(WORDS * 32), *letters], trainer)
    trained = json.loads(bpe.to_str())["model"]
    tokens = sorted(trained["vocab"], key=trained["vocab"].__getitem__) + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[tuple(pair) for pair in trained["merges"]], model_max_length=LENGTH)


def t5_tokenizer() -> T5Tokenizer:
    """A unigram tokenizer with one piece a word."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -10.0), *((f"▁{word}", -1.0) for word in WORDS)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=LENGTH)
