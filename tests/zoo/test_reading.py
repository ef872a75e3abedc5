"""The shipped text encoders read: every fact of an unseen caption can be told from its state by a linear map."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from diffalign.registry import data_root
from diffalign.zoo import reading, training
from diffalign.zoo.symbols import bits
from diffalign.zoo.text import clip_tokenizer, text_config, tokenize
from diffalign.zoo.world import sample_scene


def captions(split, count):
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng, split) for _ in range(count)]
    return tokenize(clip_tokenizer(), [scene.caption for scene in scenes]), bits(scenes)


@pytest.mark.parametrize(
    ("entry", "kind", "state"),
    [
        ("shapes-sd/text_encoder", CLIPTextModel, "pooler_output"),
        ("shapes-sd3/text_encoder", CLIPTextModelWithProjection, "text_embeds"),
        ("shapes-sd3/text_encoder_2", CLIPTextModelWithProjection, "text_embeds"),
    ],
)
@torch.no_grad()
def test_facts_are_told_from_the_pooled_state(entry, kind, state):
    encoder = kind.from_pretrained(data_root() / "zoo" / entry).eval()
    features, facts = {}, {}
    for split, count in (("train", 1024), ("test", 256)):
        ids, facts[split] = captions(split, count)
        features[split] = torch.cat([getattr(encoder(ids), state), torch.ones(count, 1)], 1).double()
    told = torch.linalg.lstsq(features["train"], facts["train"].double()).solution
    right = ((features["test"] @ told > 0.5) == facts["test"].bool()).all(1)
    assert right.float().mean() > 0.95


def test_a_lesson_teaches_and_freezes(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "SCHEDULE", training.Schedule(steps=30, learning_rate=2e-3, warmup=5))
    monkeypatch.setattr(reading, "BATCH", 16)
    torch.manual_seed(0)
    encoder = CLIPTextModel(text_config(clip_tokenizer()))
    reading.teach(encoder, reading.states(encoder), clip_tokenizer(), tmp_path, seed=0)
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    # Both readers begin at chance, ln 2 each.
    assert last["step"] == 30
    assert last["loss"] < math.log(2)
    assert not any(p.requires_grad for p in encoder.parameters())
