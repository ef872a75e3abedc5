"""One token a word, the same in every process."""

import json

import pytest

from diffalign.registry import data_root
from diffalign.zoo.text import LENGTH, WORDS, clip_tokenizer, t5_tokenizer


def test_each_word_is_one_token_of_its_own():
    for tokenizer, extra in ((clip_tokenizer(), 2), (t5_tokenizer(), 1)):
        ids = [tokenizer(word).input_ids for word in WORDS]
        assert all(len(row) == 1 + extra for row in ids)
        assert len({row[extra - 1] for row in ids}) == len(WORDS)


def test_a_caption_fits_and_starts_and_ends():
    tokenizer = clip_tokenizer()
    ids = tokenizer("a small red circle right of an orange star", padding="max_length").input_ids
    assert len(ids) == LENGTH
    assert ids[0] == tokenizer.bos_token_id
    assert ids.index(tokenizer.eos_token_id) == 10
    assert tokenizer.eos_token_id == max(tokenizer.get_vocab().values()) < 1000


def test_unknown_words_fall_apart_into_letters():
    tokenizer = clip_tokenizer()
    assert tokenizer.decode(tokenizer("zebra").input_ids, skip_special_tokens=True).strip() == "zebra"


def test_ids_survive_saving(tmp_path):
    tokenizer = clip_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert again(" ".join(WORDS[:9])).input_ids == tokenizer(" ".join(WORDS[:9])).input_ids
    assert again.model_max_length == LENGTH


TOKENIZERS = ["shapes-sd/tokenizer", "shapes-sd3/tokenizer", "shapes-sd3/tokenizer_2", "shapes-clip"]


@pytest.mark.parametrize("folder", TOKENIZERS)
def test_ids_are_those_that_the_shipped_weights_learnt(folder):
    # A trainer that orders letters by a hash gave other ids in every process: embeddings would silently be others'.
    shipped = json.loads((data_root() / "zoo" / folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert shipped == clip_tokenizer().get_vocab()
