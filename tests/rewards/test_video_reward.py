"""VideoReward in its published layout against transformers' own processor, and its frames, parts and gradients."""

import hashlib
import itertools
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.nn.functional import interpolate

from diffalign import media, rewards
from diffalign.rewards import check_gradient
from diffalign.rewards.qwen_rewards import VideoReward, video_reward
from diffalign.rewards.qwen_rewards.video_frames import frame_indices
from diffalign.rewards.qwen_rewards.video_template import TEMPLATE
from tests.rewards.pictures import larger_pictures as pictures
from tests.rewards.tiny_qwen import MODEL_CONFIG, random_model, save_video_reward, words_of

PROMPTS = ["a cat", "two dogs that run over a wide field"]
RATES = [{"fps": 3.0}, {"fps": 6}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_video_reward(tmp_path_factory.mktemp("video_reward"))


@pytest.fixture(scope="module")
def reward(folder):
    return VideoReward(folder / "checkpoint-7" / "model.pth", folder / "base")


def videos(count=2, frames=9, size=(60, 90)):
    return torch.stack([media.from_pil(list(pictures(frames, *size, seed=seed))) for seed in range(count)])


def merged_model(folder):
    """The model with W + (alpha / r) B A for its weights."""
    weights = torch.load(folder / "checkpoint-7" / "model.pth", weights_only=True)
    model = random_model(folder / "base", words_of(folder / "base") + 3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            module = "base_model.model." + name.replace("language_model.", "model.", 1).removesuffix(".weight")
            if f"{module}.lora_A.default.weight" in weights:
                low, high = (weights[f"{module}.lora_{letter}.default.weight"] for letter in "AB")
                parameter += 6 / 3 * high @ low
    return model, weights["base_model.model.rm_head.weight"]


def by_hand(folder, video, indices, prompt):
    """Raw scores (3,) of an 8-bit video (F, 3, H, W): torch's resize, transformers' video processor and model."""
    from transformers import AutoProcessor

    processor, (model, head) = AutoProcessor.from_pretrained(folder / "base"), merged_model(folder)
    tokens = [f"<|{aspect}_reward|>" for aspect in ("VQ", "MQ", "TA")]
    processor.tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    frames = interpolate(video[indices].float(), (280, 392), mode="bicubic", antialias=True).clamp(0, 255).round()
    content = [{"type": "video"}, {"type": "text", "text": TEMPLATE.replace("{prompt}", prompt)}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[text], videos=[frames], return_tensors="pt", videos_kwargs={"cap_pixels_per_frame": False})
    inputs.pop("mm_token_type_ids", None)
    length = inputs["input_ids"].shape[1]
    with torch.no_grad():
        hidden = model(**inputs, position_ids=torch.arange(length).expand(3, 1, -1)).last_hidden_state[0]
    rows = [inputs["input_ids"][0].tolist().index(index) for index in processor.tokenizer.convert_tokens_to_ids(tokens)]
    return (hidden[rows] @ head.T)[:, 0]


def test_the_instructions_are_the_published_ones():
    assert hashlib.sha256(TEMPLATE.encode()).hexdigest()[:16] == "fd7862ecb43bbe39"


@pytest.mark.skipif(find_spec("torchvision") is None, reason="transformers' video processor needs torchvision")
def test_scores_equal_transformers_own_processing(folder, reward):
    clips = videos()
    score = reward(clips, PROMPTS, RATES)
    indices = [[0, 2, 3, 5, 6, 8], [0, 3, 5, 8]]  # 6 and 3, at least 4, of 9 frames
    eight_bits = media.to_uint8(clips)
    raw = torch.stack([by_hand(folder, eight_bits[i], indices[i], PROMPTS[i]) for i in range(2)])
    truth = (raw - torch.tensor([3.0, 1.0, 2.0])) / torch.tensor([2.0, 1.5, 0.5])
    for column, aspect in enumerate(("VQ", "MQ", "TA")):
        part = score.parts[f"video-reward-{aspect}"]
        torch.testing.assert_close(part, truth[:, column], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(score.value, truth.sum(dim=1), rtol=1e-3, atol=3e-3)
    assert set(score.parts) == {"video-reward-VQ", "video-reward-MQ", "video-reward-TA"}
    assert (truth[0] - truth[1]).abs().min() > 0.02  # the comparison would notice a mixed-up row or frame


@pytest.mark.parametrize(
    ("count", "fps", "number"),
    [(81, 16, 10), (49, 8, 12), (16, 24, 4), (5, 8, 4), (3, 8, 2), (2, 8, 2), (4000, 2, 768), (20, 8, 4), (28, 8, 8)],
)
def test_the_number_of_frames(count, fps, number):
    indices = frame_indices(count, fps)
    assert len(indices) == number
    assert (indices[0], indices[-1]) == (0, count - 1)
    assert all(later > earlier for earlier, later in itertools.pairwise(indices))


def test_one_forward_pass_serves_the_three_aspects(reward, monkeypatch):
    vq, mq, _ = reward.members
    calls, read = [], vq.scorer.reader._read
    monkeypatch.setattr(vq.scorer.reader, "_read", lambda *inputs: calls.append(1) or read(*inputs))
    clips = videos()
    whole = reward(clips, PROMPTS, RATES)
    assert len(calls) == 1
    mixed = (vq + 0.5 * mq)(clips, PROMPTS, RATES)
    assert len(calls) == 2
    torch.testing.assert_close(mixed.value, whole.parts["video-reward-VQ"] + 0.5 * whole.parts["video-reward-MQ"])
    turned = reward(clips.flip(0), PROMPTS[::-1], RATES[::-1])  # another batch is another pass
    torch.testing.assert_close(turned.value.flip(0), whole.value, rtol=0, atol=5e-5)
    assert len(calls) == 3


def test_neighbours_do_not_change_a_score(reward):
    clips = videos()
    together = reward(clips, PROMPTS, RATES).value
    alone = [reward(clips[i : i + 1], PROMPTS[i : i + 1], RATES[i : i + 1]).value for i in range(2)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=5e-5)


def test_what_cannot_be_scored_says_why(reward):
    clips = videos(1).expand(4, -1, -1, -1, -1)
    facts = [{}, {"fps": 0}, {"fps": 3}, {"fps": float("nan")}]
    score = reward(clips, ["a cat", "a cat", "a cat <|MQ_reward|>", "a cat"], facts)
    assert not score.valid.any()
    assert "no fps" in score.reasons[0]
    assert "fps is 0" in score.reasons[1]
    assert "spells a token" in score.reasons[2]
    assert "fps is nan" in score.reasons[3]
    still = reward(clips[:1, :1], ["a cat"], [{"fps": 3}])
    assert "has 1 frame" in still.reasons[0]


def test_gradients_reach_the_frames_that_are_seen(folder, monkeypatch):
    """And are those of finite differences, with the rounding off, for a staircase has no other gradient."""
    monkeypatch.setattr(video_reward, "quantise", lambda x: x)
    monkeypatch.setattr(video_reward, "_LEAST_PIXELS", 4 * 28 * 28)
    small = VideoReward(folder / "checkpoint-7" / "model.pth", folder / "base", dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    clip = torch.rand(1, 6, 3, 50, 70, dtype=torch.float64, generator=generator).mul(0.8).add(0.1)
    facts = [{"fps": 3.0}]
    leaf = clip.clone().requires_grad_()
    gradient = torch.autograd.grad(small(leaf, ["a cat"], facts).value.sum(), leaf)[0]
    seen = gradient.abs().amax(dim=(0, 2, 3, 4)) > 0
    assert seen.nonzero().flatten().tolist() == frame_indices(6, 3.0)
    for direction in (gradient, torch.randn(clip.shape, dtype=torch.float64, generator=generator)):
        unit = direction / direction.abs().max()
        ends = [small(clip + sign * 2e-3 * unit, ["a cat"], facts).value.double() for sign in (1, -1)]
        slope = (ends[0] - ends[1]).item() / 4e-3
        assert slope == pytest.approx((gradient * unit).sum().item(), rel=2e-2, abs=1e-3)
    assert (check_gradient(small, clip, ["a cat"], facts) > 0).all()


def test_bfloat16_weights_leave_the_adapter_in_float32(folder, reward):
    half = VideoReward(folder / "checkpoint-7" / "model.pth", folder / "base", dtype=torch.bfloat16)
    layer = half.members[0].scorer.reader.model.language_model.layers[0].mlp.up_proj
    assert (layer.base_layer.weight.dtype, layer.lora_A["default"].weight.dtype) == (torch.bfloat16, torch.float32)
    clips = videos()
    close = half(clips, PROMPTS, RATES).value - reward(clips, PROMPTS, RATES).value
    assert 0 < close.abs().max() < 2  # of scores around -20


def test_a_head_of_three_rows_gives_each_token_its_own(folder, tmp_path):
    weights = torch.load(folder / "checkpoint-7" / "model.pth", weights_only=True)
    row = weights["base_model.model.rm_head.weight"]
    (tmp_path / "model_config.json").write_text(json.dumps(MODEL_CONFIG | {"inference_config": None}))
    scores = []
    for head in (row, torch.cat([row, 2 * row, -row])):
        torch.save(weights | {"base_model.model.rm_head.weight": head}, tmp_path / "model.pth")
        how = {"config": tmp_path / "model_config.json", "name": "r"}
        score = VideoReward(tmp_path / "model.pth", folder / "base", **how)(videos(1), PROMPTS[:1], RATES[:1])
        scores.append([score.parts[f"r-{aspect}"].item() for aspect in ("VQ", "MQ", "TA")])
    assert scores[1] == pytest.approx([scores[0][0], 2 * scores[0][1], -scores[0][2]], rel=1e-5)


@pytest.mark.parametrize(
    ("key", "value"), [("sample_type", "multi_pts"), ("prompt_template_type", "simple"), ("num_frames", 8)]
)
def test_a_model_that_reads_otherwise_is_refused(tmp_path, key, value):
    changed = MODEL_CONFIG | {"data_config": MODEL_CONFIG["data_config"] | {key: value}}
    (tmp_path / "model_config.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=f"{key} is {value!r}"):
        video_reward.VideoSettings.read(tmp_path / "model_config.json")


def test_a_recipe_builds_it(folder):
    from diffalign.rewards.qwen_rewards import recipes  # noqa: F401

    facts = {"scale": "x", "licence": "x", "source": "x", "needs": ["prompt", "fps"], "differentiable": True}
    places = {"checkpoint": str(folder / "checkpoint-7" / "model.pth"), "base": str(folder / "base")}
    built = rewards.load({"name": "mine", "type": "video_reward"} | places | facts)
    assert [member.name for member in built.members] == ["mine-VQ", "mine-MQ", "mine-TA"]
    assert built.media == "video"


@pytest.mark.verify
def test_the_comparison_with_transformers_beside_torchvision():
    """The test above, in a process that finds the torchvision which `make test` keeps apart."""
    apart = Path(__file__).parents[2] / ".venv" / "open_clip"
    if not (apart / "torchvision").is_dir():
        pytest.skip("torchvision is not there: make test brings it")
    which = f"{__file__}::test_scores_equal_transformers_own_processing"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(apart), *filter(None, sys.path)])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", which]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "1 passed" in done.stdout, done.stdout + done.stderr
