"""One token a word, the same in every process."""

import json
import os
import subprocess
import sys

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


def test_ids_are_the_same_in_every_process():
    code = (
        "from diffalign._compat import ensure_torchvision; ensure_torchvision();"
        "from diffalign.zoo.text import clip_tokenizer; import json; print(json.dumps(clip_tokenizer().get_vocab()))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert json.loads(out.stdout.splitlines()[-1]) == clip_tokenizer().get_vocab()
