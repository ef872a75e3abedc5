"""MJ-VIDEO: InternVL2 with a mixture of experts rates a video in five aspects and as a whole.

Tong et al. (2025), "MJ-VIDEO: Fine-Grained Benchmarking and Rewarding Video Preferences in Video Generation",
arXiv:2502.01719.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.rewards.combination import Combination, Rows
from diffalign.rewards.encoders import shared
from diffalign.rewards.mj_video.head import ASPECTS, load_head
from diffalign.rewards.mj_video.reader import InternVLReader
from diffalign.rewards.mj_video.template import FRAMES
from diffalign.rewards.video_aspects import VideoAspect
from diffalign.rewards.weights import find_weights, read_weights, within


def frame_indices(count: int) -> list[int]:
    """Of the eight frames that are seen, at equal distances from the first on; the last is never among them."""
    return [number * (count - 1) // FRAMES for number in range(FRAMES)]


class MJVideoScorer:
    """The network, which gives six scores at once; what it gave is kept for one batch, see `shared_features`."""

    def __init__(self, checkpoint: str | Path, base: str | Path, **how: Any) -> None:
        file = find_weights(str(checkpoint))
        weights = read_weights(file)
        self.reader = InternVLReader(within(weights, "model."), base, str(file), **how)
        head = {name: tensor for name, tensor in weights.items() if not name.startswith("model.")}
        self.head = load_head(head, self.reader.model.config.text_config.hidden_size, str(file))

    def to(self, device: torch.device | str) -> None:
        """Moves the weights."""
        self.reader.to(device)
        self.head.to(device)

    def __call__(self, videos: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        """(B, 6) float32 of videos (B, F, 3, H, W)."""
        return shared(self, videos, tuple(prompts), lambda: self._scores(videos, prompts))

    def _scores(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        states = self.reader(list(videos[:, frame_indices(videos.shape[1])]), prompts)
        with torch.autocast(states.device.type, enabled=False):
            return self.head(*states.unbind(dim=1))


class MJVideoReward(Combination):
    """MJ-VIDEO's score of a video for its prompt, about 1 for a good one and -1 for a bad one; higher is preferred.

    Experts rate 28 criteria, r = W h, where h is the hidden state of the last token. Gates g, small networks of the
    hidden state at the end of the question, weigh them: an aspect's score is s_a = k sum_c softmax_c(g_c) r_c over its
    own criteria, and the whole is k' sum_a softmax_a(g_a) s_a, with learnt scales k and k', as the authors'
    ``moe_reward.py`` has it. ``parts`` of the score holds each aspect under NAME-alignment, NAME-safety, NAME-fineness,
    NAME-coherence (and consistency) and NAME-fairness (and freedom of bias), and the whole under NAME-overall;
    ``members`` are rewards of their own, to be weighed otherwise: one forward pass serves all of them in a sum.

    Eight frames are seen, resized as 8-bit pixels to 448 x 448; gradients reach them straight through the roundings.
    Their tokens all stand in the place of the first, though the text names eight: so the authors' code fills it in, in
    training too. The prompt is read whole. A video fails whose prompt spells a mark of the model, or makes the text
    longer than the model reads.

    Departures: the authors run all of it in bfloat16, the rotary angles' cosines too; here it runs in ``dtype``, and
    the head in float32.

    Args:
        checkpoint: file, or OWNER/NAME/FILE on the hub: ``MJ-Bench/MJ-VIDEO-2B/model.safetensors``.
        base: folder or hub id of InternVL2-2B: sizes and tokenizer; its weights are not read and its code is not run.
        name: default: "mj-video".
        revision: of the base's hub repository.
        dtype: of the backbone's weights.
        batch_size: videos in one forward pass; it does not change the result.

    Raises:
        ValueError: the checkpoint is of another network, or the tokenizer does not belong to it.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        base: str | Path = "OpenGVLab/InternVL2-2B",
        *,
        name: str = "mj-video",
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 2,
    ) -> None:
        scorer = MJVideoScorer(checkpoint, base, revision=revision, dtype=dtype, batch_size=batch_size)
        columns = enumerate((*ASPECTS, "overall"))
        super().__init__([VideoAspect(scorer, at, f"{name}-{part}", ("prompt",)) for at, part in columns], name)

    def combine(self, rows: Rows) -> Tensor:
        """The whole (N,)."""
        return rows.values[-1]
