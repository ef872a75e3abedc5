"""The scorers of the contract: each from tiny files in the layout in which its real ones were published."""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from diffalign import media
from diffalign.registry import data_root
from diffalign.rewards import Reward
from diffalign.rewards.aesthetic import AestheticReward
from diffalign.rewards.clip import CLIPReward, PickScoreReward
from diffalign.rewards.conditions import DepthConsistency, EdgeConsistency, SegmentationConsistency
from diffalign.rewards.frames import FrameReward
from diffalign.rewards.geneval import GenEval
from diffalign.rewards.hps import HPSReward
from diffalign.rewards.imagereward import ImageReward
from diffalign.rewards.jpeg import JpegSize
from diffalign.rewards.mj_video.reward import MJVideoReward
from diffalign.rewards.motion import DynamicDegree, MotionSmoothness
from diffalign.rewards.mps import MPSReward
from diffalign.rewards.ocr import TextMatch
from diffalign.rewards.pal import PalModel, PalReward
from diffalign.rewards.preference import PreferenceHead, PreferenceReward
from diffalign.rewards.qwen_rewards.hpsv3 import HPSv3Reward
from diffalign.rewards.qwen_rewards.video_reward import VideoReward
from diffalign.rewards.subject import SubjectSimilarity
from diffalign.rewards.vlm import GoalBaseline, LocalVLM, Rating, YesLogit
from diffalign.rewards.vlm.judge import Question
from diffalign.rewards.vlm.unified_reward import AXES
from diffalign.rewards.vlm.written import AnswerForm, WrittenRating
from tests.parity.imagereward_case import random_checkpoint, write_tokenizer
from tests.rewards import tiny
from tests.rewards.pictures import pictures
from tests.rewards.tiny_internvl import save_mj_video
from tests.rewards.tiny_qwen import save_hpsv3, save_video_reward
from tests.rewards.tiny_vision import write_dino, write_dpt, write_mask2former, write_segformer
from tests.rewards.tiny_vlm import save_vlm


@dataclass(frozen=True)
class Scorer:
    """What the contract needs to know of a scorer.

    Attributes:
        build: from a folder of tiny files.
        layout: the published files that those have the names and tensors of; None: there are none.
        card: the shipped recipe that tells its licence.
        prompts: of the three samples.
        bound: of the difference between finite differences and the gradient, over the gradient's norm.
        metadata: of each sample.
        step: of the finite differences; larger where the network has parts in float32 for good.
        rounds: whether it rounds images to 8 bits itself.
        library: that must be installed beside those that everything needs.
    """

    build: Callable[[Path], Reward]
    layout: str | None
    card: str
    prompts: tuple[str, ...] = ("a red circle", "two blue squares", "a big square")
    bound: float = 1e-4
    step: float = 1e-6
    metadata: dict[str, Any] = field(default_factory=dict)
    rounds: bool = True
    library: str | None = None

    def runs(self) -> bool:
        """Whether its library is installed."""
        return self.library is None or find_spec(self.library) is not None


def aesthetic(folder: Path, weights: dict[str, torch.Tensor]) -> Reward:
    save_file(weights, folder / "head.safetensors")
    return AestheticReward(tiny.write_clip(folder / "clip"), folder / "head.safetensors")


def linear_head(width: int) -> dict[str, torch.Tensor]:
    return {"weight": torch.randn(1, width, generator=torch.Generator().manual_seed(0)), "bias": torch.ones(1)}


def hps(folder: Path) -> Reward:
    base = tiny.write_clip(folder / "base")
    tiny.write_hps(base, folder / "HPS_v2.1_compressed.pt")
    return HPSReward(folder / "HPS_v2.1_compressed.pt", base)


def image_reward(folder: Path) -> Reward:
    torch.save(random_checkpoint(), folder / "ImageReward.pt")
    write_tokenizer(folder / "bert-base-uncased")
    return ImageReward(folder / "ImageReward.pt", tokenizer=folder / "bert-base-uncased")


def mps(folder: Path) -> Reward:
    base = tiny.write_clip(folder / "base", projection_dim=128)
    return MPSReward(tiny.write_mps(base, folder / "MPS.pt"), base, condition="big green, square")


def hpsv3(folder: Path) -> Reward:
    return HPSv3Reward(save_hpsv3(folder) / "HPSv3.safetensors", folder / "base")


def mj_video(folder: Path) -> Reward:
    return MJVideoReward(save_mj_video(folder) / "model.safetensors", folder / "base")


def video_reward(folder: Path) -> Reward:
    return VideoReward(save_video_reward(folder) / "checkpoint-7" / "model.pth", folder / "base")


def preference(folder: Path) -> Reward:
    PreferenceHead(16, likelihood="gaussian", hidden=8).save(folder / "head.safetensors")
    return PreferenceReward(tiny.write_clip(folder / "clip"), folder / "head.safetensors")


def pal(folder: Path) -> Reward:
    PalModel(16, ["ann", "bob"], prototypes=2).save(folder / "users.safetensors")
    return PalReward(tiny.write_clip(folder / "clip"), folder / "users.safetensors")


def vlm(folder: Path) -> LocalVLM:
    return LocalVLM(save_vlm(folder))


def geneval(folder: Path) -> Reward:
    return GenEval(write_mask2former(folder / "detector"), tiny.write_clip(folder / "clip"))


def written(folder: Path) -> Reward:
    """A random model writes no form: here its answer is one token, and the number is that of its bytes together.

    What it sees hardly moves what it says: so its last layer forgets what a picture of something else makes it say.
    """
    judge = vlm(folder)
    judge.model.generation_config.eos_token_id = list(range(len(judge.processor.tokenizer)))
    with torch.no_grad():
        inputs = judge._inputs([Question((PICTURE,), AXES.question)])
        common = judge.model(**inputs, output_hidden_states=True).hidden_states[-1][0, -1]
        words = judge.model.get_output_embeddings().weight
        words -= torch.outer(words @ common, common) / common.square().sum()
    return WrittenRating(judge, AnswerForm(AXES.question, ("bytes",), lambda text: (float(sum(text.encode())),)))


def open_clip(folder: Path) -> Reward:
    return CLIPReward(f"local-dir:{data_root() / 'zoo' / 'shapes-clip'}", library="open_clip")


PICTURE = media.from_pil(next(pictures(1, 60, 84, seed=5)))[0]
CLASSES = (torch.arange(60)[:, None] // 20 + torch.arange(84) // 42).contiguous()  # 0 to 3

SCORERS = {
    "CLIP": Scorer(lambda f: CLIPReward(tiny.write_clip(f)), "transformers' CLIPModel", "clip-vit-l-14"),
    "SigLIP / SigLIP 2": Scorer(lambda f: CLIPReward(tiny.write_siglip(f)), "transformers' SiglipModel", "siglip2"),
    "PickScore": Scorer(lambda f: PickScoreReward(tiny.write_clip(f)), "transformers' CLIPModel", "pickscore"),
    "HPSv2 / 2.1": Scorer(hps, "HPS_v2.1_compressed.pt, open_clip's names", "hpsv2.1"),
    "LAION aesthetic v1": Scorer(lambda f: aesthetic(f, linear_head(16)), "weight, bias", "laion-aesthetic-v1"),
    "LAION aesthetic v2": Scorer(
        lambda f: aesthetic(f, tiny.published_head(16)), "layers.0 to layers.7", "laion-aesthetic-v2"
    ),
    "ImageReward": Scorer(image_reward, "ImageReward.pt", "image-reward"),
    "MPS": Scorer(mps, "tensors of the published modules", "mps"),
    "VLM-RM": Scorer(
        lambda f: GoalBaseline(tiny.write_clip(f), "a red one", alpha=0.5), "transformers' CLIPModel", "vlm-rm"
    ),
    "VQAScore, Qwen2.5-VL": Scorer(
        lambda f: YesLogit(vlm(f), score="logit"),
        "transformers' Qwen2.5-VL",
        "vqascore-qwen2.5-vl",
        bound=2e-2,
        step=1e-4,
    ),
    "VLM rating": Scorer(
        lambda f: Rating(vlm(f)), "transformers' Qwen2.5-VL", "vqascore-qwen2.5-vl", bound=2e-2, step=1e-4
    ),
    "HPSv3": Scorer(hpsv3, "HPSv3.safetensors, names of transformers 4.45", "hpsv3", bound=2e-2, step=1e-4),
    "MJ-VIDEO": Scorer(mj_video, "model.safetensors, InternVL2's names", "mj-video", bound=2e-2, step=1e-4),
    "VideoReward": Scorer(
        video_reward,
        "checkpoint-N/model.pth, model_config.json",
        "video-reward",
        bound=2e-2,
        step=1e-4,
        metadata={"fps": 2.0},
    ),
    "preference head": Scorer(preference, "our own safetensors", "shapes-preference"),
    "PAL": Scorer(pal, "our own safetensors", "shapes-preference", metadata={"user": "ann"}),
    "JPEG size": Scorer(lambda _: JpegSize(), None, "jpeg-size"),
    "OCR": Scorer(lambda _: TextMatch(), "the wheel of rapidocr", "ocr", ('a sign "GO"', 'a "cat"', 'say "42"')),
    "open_clip": Scorer(open_clip, "open_clip's models", "clip-vit-bigg-14", library="open_clip"),
    "DINO subject": Scorer(
        lambda f: SubjectSimilarity(write_dino(f)),
        "transformers' ViTModel",
        "dino-subject",
        metadata={"reference": PICTURE},
    ),
    "edges": Scorer(
        lambda _: EdgeConsistency(), None, "edge-consistency", metadata={"edges": PICTURE}, step=1e-8, rounds=False
    ),
    "depth": Scorer(
        lambda f: DepthConsistency(write_dpt(f)),
        "transformers' DPTForDepthEstimation",
        "depth-consistency",
        metadata={"depth": 0.1 + PICTURE.mean(0)},
    ),
    "segmentation": Scorer(
        lambda f: SegmentationConsistency(write_segformer(f)),
        "transformers' SegformerForSemanticSegmentation",
        "segmentation-consistency",
        metadata={"segmentation": CLASSES},
    ),
    "GenEval": Scorer(
        geneval,
        "transformers' Mask2Former and CLIPModel",
        "geneval",
        metadata={"include": [{"class": "dog", "count": 5, "color": "red"}]},
    ),
    "written rating": Scorer(written, "transformers' Qwen2.5-VL", "unified-reward"),
    "CLIP on frames": Scorer(
        lambda f: FrameReward(CLIPReward(tiny.write_clip(f)), "all"), "transformers' CLIPModel", "clip-vit-l-14"
    ),
    "motion smoothness": Scorer(lambda _: MotionSmoothness(), None, "motion-smoothness"),
    # which pixels change most changes itself, so the step is short
    "dynamic degree": Scorer(lambda _: DynamicDegree(), None, "dynamic-degree", step=1e-8),
}


def samples(reward: Reward) -> torch.Tensor:
    """Three images, or videos of four frames, on 8-bit levels."""
    if reward.media == "image":
        return media.from_pil(list(pictures(3, 60, 84)))
    frames = media.from_pil(list(pictures(12, 40, 36)))
    return frames.reshape(3, 4, *frames.shape[1:])
