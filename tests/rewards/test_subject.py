"""Subject similarity against transformers' own processors and networks, its references, and RPO's mix."""

import logging
import os
import re

import pytest
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity

from diffalign import media, rewards
from diffalign.registry import data_root
from diffalign.rewards import check_gradient, recipe_content  # noqa: F401
from diffalign.rewards.encoders import DualEncoder, load_encoder
from diffalign.rewards.subject import SubjectSimilarity, VisionEncoder
from tests.rewards.pictures import PROMPTS, pictures
from tests.rewards.tiny_vision import write_dino, write_dinov2, write_segformer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {"dino": write_dino(folder / "dino"), "dinov2": write_dinov2(folder / "dinov2"), "files": folder}


@pytest.fixture(scope="module")
def wide():
    return list(pictures(5, 40, 50))  # newer Pillows squash tall ones height first, see media.resize


@pytest.fixture(scope="module")
def reward(folders):
    return SubjectSimilarity(folders["dino"])


@pytest.mark.parametrize("name", ["dino", "dinov2"])
def test_cosines_equal_those_of_transformers(folders, wide, name):
    from transformers import AutoImageProcessor, AutoModel

    processor = AutoImageProcessor.from_pretrained(folders[name], backend="pil")
    model = AutoModel.from_pretrained(folders[name]).eval()
    with torch.no_grad():
        tokens = model(**processor(wide, return_tensors="pt")).last_hidden_state[:, 0]
    files = [folders["files"] / f"{name}-{i}.png" for i in range(2)]
    for file, picture in zip(files, wide[3:], strict=True):
        media.save_png(picture, file)
    expected = torch.stack([cosine_similarity(tokens[:3], tokens[i : i + 1]) for i in (3, 4)]).mean(0)

    found = SubjectSimilarity(folders[name])(media.from_pil(wide[:3]), [""] * 3, [{"reference": files}] * 3)
    torch.testing.assert_close(found.value, expected, rtol=0, atol=2e-6)
    assert expected.std() > 0.05


def test_clip_is_the_encoder_that_other_rewards_use(tiny_clip, wide):
    images = media.from_pil(wide[:3])
    reward, encoder = SubjectSimilarity(tiny_clip), load_encoder(tiny_clip)
    assert reward.encoder is encoder
    features = encoder.image_features(images)
    scores = reward(images, [""] * 3, [{"reference": images[0]}] * 3).value
    torch.testing.assert_close(scores, features @ features[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(scores[0], torch.tensor(1.0))


def test_gradients_reach_the_image_and_not_the_reference(reward, wide):
    images, reference = media.from_pil(wide[:2]), media.from_pil(wide[3])[0].requires_grad_()
    assert (check_gradient(reward, images, ["", ""], [{"reference": reference}] * 2) > 0).all()
    assert not reward(images, ["", ""], [{"reference": reference}] * 2).value.requires_grad


def test_scores_do_not_depend_on_the_batch(reward, wide):
    images, metadata = media.from_pil(wide), [{"reference": media.from_pil(each)[0]} for each in reversed(wide)]
    whole = reward(images, [""] * 5, metadata).value
    alone = torch.cat([reward(images[i : i + 1], [""], metadata[i : i + 1]).value for i in range(5)])
    torch.testing.assert_close(whole, alone, rtol=0, atol=1e-6)
    assert whole[2] > whole.max() - 1e-6  # its own reference


def test_references_are_encoded_once_until_their_file_changes(folders, wide, tmp_path, monkeypatch):
    reward, encoded, file = SubjectSimilarity(folders["dino"]), [], tmp_path / "reference.png"
    features = VisionEncoder.image_features
    monkeypatch.setattr(VisionEncoder, "image_features", lambda self, x: encoded.append(len(x)) or features(self, x))
    images, same = media.from_pil(wide[:3]), media.from_pil(wide[1])

    def paint(colour):  # files of one size, so that the time alone tells them apart
        media.save_png(Image.new("RGB", (50, 40), colour), file)
        file.write_bytes(file.read_bytes().ljust(1000, b"\0"))

    paint((200, 0, 0))
    metadata = [{"reference": str(file)}, {"reference": same}, {"reference": [file, same.clone()[0]]}]
    first = reward(images, [""] * 3, metadata)
    assert encoded == [1, 1, 3]
    assert torch.equal(reward(images, [""] * 3, metadata).value, first.value)
    assert encoded == [1, 1, 3, 3]
    paint((0, 200, 0))
    os.utime(file, (0, 0))
    assert abs(reward(images, [""] * 3, metadata).value[0] - first.value[0]) > 1e-3
    assert encoded == [1, 1, 3, 3, 1, 3]


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        (None, "reference is None, and must be a path"),
        ([], "an empty list"),
        ("nowhere.png", "nowhere.png does not exist"),
        (torch.zeros(1, 8, 8), r"a tensor \(1, 8, 8\)"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), "torch.uint8"),
        ({"path": "x"}, "must be a path"),
    ],
)
def test_a_wrong_reference_costs_its_own_score_only(reward, wide, caplog, reference, words):
    images, metadata = media.from_pil(wide[:2]), [{"reference": media.from_pil(wide[0])}, {"reference": reference}]
    with caplog.at_level(logging.ERROR):
        score = reward(images, ["", ""], metadata)
    assert score.valid.tolist() == [True, False]
    assert re.search(words, score.reasons[1])


def test_a_network_without_class_token_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no class token"):
        SubjectSimilarity(write_segformer(tmp_path / "segformer"))


def test_rpo_is_the_harmonic_mean_of_both_similarities(tiny_clip, wide):
    card = rewards.read_recipe(data_root("rewards") / "rpo.yaml").model_dump()
    for term in card["terms"]:
        (inner,) = term["reward"]["terms"]
        inner["reward"]["path"] = str(tiny_clip)
    reward = rewards.load(card | {"token_limit": 16})
    images, metadata = media.from_pil(wide[:3]), [{"reference": media.from_pil(wide[3:])}] * 3
    encoder = load_encoder(tiny_clip)
    assert isinstance(encoder, DualEncoder)
    features = encoder.image_features(images)
    subject = (features @ encoder.image_features(media.from_pil(wide[3:])).T).mean(1) / 2 + 0.5
    text = (features * encoder.text_features(PROMPTS)).sum(1) / 2 + 0.5
    expected = 1 / (0.3 / (subject + 1e-8) + 0.7 / (text + 1e-8))
    found = reward(images, PROMPTS, metadata)
    torch.testing.assert_close(found.value, expected, rtol=1e-5, atol=0)
    assert found.value.std() > 1e-3
    assert (check_gradient(reward, images, PROMPTS, metadata) > 0).all()
