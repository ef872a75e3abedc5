"""VideoReward: Qwen2-VL rates a video's visual quality, motion quality and text alignment.

Liu et al. (2025), "Improving Video Generation with Human Feedback", arXiv:2501.13918, section 3.2.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from diffalign.media import quantise, resize
from diffalign.rewards.combination import Combination, Rows
from diffalign.rewards.encoders import shared
from diffalign.rewards.qwen_rewards.checkpoint import split_weights
from diffalign.rewards.qwen_rewards.reader import QwenReader
from diffalign.rewards.qwen_rewards.video_frames import frame_indices
from diffalign.rewards.qwen_rewards.video_template import TEMPLATE
from diffalign.rewards.video_aspects import VideoAspect
from diffalign.rewards.vlm.qwen_patches import Folded
from diffalign.rewards.weights import find_weights, read_weights

ASPECTS = ("VQ", "MQ", "TA")
_LEAST_PIXELS = 128 * 28 * 28  # of a frame
_READ = {"sample_type": "uniform", "prompt_template_type": "detailed_special", "num_frames": None}
_DEFAULTS = {"sample_type": "uniform", "fps": 2.0, "max_frame_pixels": 240 * 320}  # of the authors' code


@dataclass(frozen=True)
class VideoSettings:
    """What `model_config.json` beside a checkpoint says.

    Attributes:
        fps: frames a second that are seen.
        max_pixels: of a frame.
        mean, std: of each aspect's raw score on the authors' data; 0 and 1 where the file has none.
        lora: ``lora_alpha`` and ``use_rslora``.
    """

    fps: float
    max_pixels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    lora: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Self:
        """ValueError where the file is of a model that reads videos in another way, or lacks something."""
        tree = json.loads(path.read_text(encoding="utf-8"))
        try:
            data, lora, scale = _DEFAULTS | tree["data_config"], tree["peft_lora_config"], tree.get("inference_config")
            for key, wanted in _READ.items():
                if data.get(key) != wanted:
                    raise ValueError(f"{path}: {key} is {data.get(key)!r}, and only {wanted!r} is read here.")
            mean, std = (
                tuple(float(scale[f"{aspect}_{kind}"]) if scale else default for aspect in ASPECTS)
                for kind, default in (("mean", 0.0), ("std", 1.0))
            )
            lora = {"lora_alpha": lora["lora_alpha"], "use_rslora": bool(lora.get("use_rslora"))}
            return cls(float(data["fps"]), int(data["max_frame_pixels"]), mean, std, lora)
        except KeyError as error:
            raise ValueError(f"{path} lacks {error.args[0]}: it is no configuration of VideoReward.") from None


class VideoScorer:
    """The network, which gives three scores at once; what it gave is kept for one batch, see `shared_features`."""

    def __init__(
        self, checkpoint: str | Path, base: str | Path, config: str | Path | None, revision: str | None, **how: Any
    ) -> None:
        file = find_weights(str(checkpoint))
        self.settings = VideoSettings.read(_config_file(file, str(checkpoint)) if config is None else Path(config))
        backbone, head = split_weights(read_weights(file))
        marks = [f"<|{aspect}_reward|>" for aspect in ASPECTS]
        self.reader = QwenReader(
            backbone, base, marks, "video", str(file), revision=revision, lora=self.settings.lora, **how
        )
        self.patches = replace(self.reader.patches, min_pixels=_LEAST_PIXELS, max_pixels=self.settings.max_pixels)
        width = self.reader.model.config.text_config.hidden_size
        weight = head.get("weight")
        if len(head) != 1 or weight is None or tuple(weight.shape) not in ((1, width), (3, width)):
            raise ValueError(f"{file}: its head is not one linear layer from {width} numbers to 1 or 3 without a bias.")
        self.head = weight.float().expand(3, width)  # one row for all tokens, or one for each

    def to(self, device: torch.device | str) -> None:
        """Moves the weights."""
        self.reader.to(device)
        self.head = self.head.to(device)

    def __call__(self, videos: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        """(B, 3) float32, standardised, of videos (B, F, 3, H, W) whose metadata have their fps."""
        rates = [_fps(facts) for facts in metadata]
        facts = (tuple(prompts), tuple(rates))
        return shared(self, videos, facts, lambda: self._scores(videos, prompts, rates))

    def _scores(self, videos: Tensor, prompts: Sequence[str], rates: Sequence[float]) -> Tensor:
        folded = [self._fold(video, fps) for video, fps in zip(videos, rates, strict=True)]
        states = self.reader(folded, [TEMPLATE.format(prompt=prompt) for prompt in prompts])
        with torch.autocast(states.device.type, enabled=False):
            raw = (states * self.head).sum(dim=-1)
        return (raw - raw.new_tensor(self.settings.mean)) / raw.new_tensor(self.settings.std)

    def _fold(self, video: Tensor, fps: float) -> Folded:
        """Frames as 8-bit pixels; they are filtered without the rounding between, as torchvision filters tensors."""
        frames = video[frame_indices(len(video), fps, self.settings.fps)].to(self.reader.model.device)
        size = self.patches.size(*frames.shape[-2:])
        return self.patches.fold(quantise(resize(quantise(frames), size, self.patches.filter, rounding=False)))


class VideoReward(Combination):
    """VQ + MQ + TA, each (w h - mean) / std, so that 0 is the mean of the authors' videos; higher is preferred.

    The hidden states h at <|VQ_reward|>, <|MQ_reward|> and <|TA_reward|>, which end the three parts of the authors'
    rating instructions, go through one linear layer w without a bias, and are standardised by the mean and std that
    stand in ``model_config.json``. ``parts`` of the score holds each aspect under NAME-VQ, NAME-MQ and NAME-TA;
    ``members`` are rewards of their own, to be weighed otherwise: one forward pass serves all of them in a sum.

    A video is seen at 2 frames a second (see `frame_indices`), so its own rate must be told: the metadata of each has
    "fps", as `diffalign score` reads from the file. Frames become at most 448 x 448 pixels, in multiples of 28 along
    each edge; gradients reach the frames that are seen, straight through the rounding to 8 bits. The prompt is read
    whole. A video fails that has no fps or fewer than 2 frames, or whose prompt spells one of the tokens.

    Departures: the authors run the backbone in bfloat16; here it runs in ``dtype``, and the head in float32. Angles of
    the image encoder's rotary embedding are not rounded to bfloat16; its frequencies are.

    Args:
        checkpoint: file, or OWNER/NAME/FILE on the hub: ``KwaiVGI/VideoReward/checkpoint-11352/model.pth``, which holds
            base, adapter and head together. Adapters saved by themselves are not read.
        base: folder or hub id of Qwen2-VL-2B-Instruct: sizes, tokenizer, image processor and chat template; its
            weights are not read.
        config: ``model_config.json``; default: the one in the folder above the checkpoint's.
        name: default: "video-reward".
        revision: of the base's hub repository.
        dtype: of the backbone's weights.
        batch_size: videos in one forward pass; it does not change the result.

    Raises:
        ValueError: the checkpoint is of another network, or the tokenizer does not belong to it.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        base: str | Path = "Qwen/Qwen2-VL-2B-Instruct",
        *,
        config: str | Path | None = None,
        name: str = "video-reward",
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 2,
    ) -> None:
        scorer = VideoScorer(checkpoint, base, config, revision, dtype=dtype, batch_size=batch_size)
        needs, columns = ("prompt", "fps"), enumerate(ASPECTS)
        super().__init__([VideoAspect(scorer, at, f"{name}-{aspect}", needs) for at, aspect in columns], name)

    def combine(self, rows: Rows) -> Tensor:
        """The sum (N,)."""
        return rows.values[0] + rows.values[1] + rows.values[2]


def _config_file(file: Path, checkpoint: str) -> Path:
    """Of a local file that of the folder above; of one on the hub that of the repository."""
    if Path(checkpoint).is_file():
        return file.parent.parent / "model_config.json"
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download("/".join(checkpoint.split("/")[:2]), "model_config.json"))


def _fps(facts: dict[str, Any]) -> float:
    if facts.get("fps") is None:
        raise ValueError("the metadata has no fps, frames a second of the video: VideoReward sees some of them.")
    return float(facts["fps"])
