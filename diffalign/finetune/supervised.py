r"""The denoising loss on images of one's own, beside the loss of any method.

    L  +  weight * mean over the images of e(x_t, t, c),     x_t = alpha_t x_0 + sigma_t noise

with e the error of `forward.denoising_error`, a mean over a latent's elements in the units of the network. Every
optimiser update draws `batch_size` images, uniformly with replacement, and for each a level, uniform over those of
pre-training, and a noise. It holds the policy to what the images show: those of pre-training, or of the base itself,
drawn without guidance, which the prediction has not either: images that guidance drew would teach it guidance.

Sources: Xu et al. 2023 (ReFL, arXiv 2304.05977), algorithm 1, which has the loss of pre-training beside that of the
reward; for images of the base Ruiz et al. 2023 (DreamBooth, arXiv 2208.12242), equation 2.

Departures: ReFL takes a step by each of its two losses in turn, and scales the reward's; here they are added in every
update, and the weight is of this one. (Its published code has the reward's alone.) As in `dpo`, images are encoded
once, to the VAE's mode, cropped in the middle and not flipped, no caption is dropped, a denoiser that embeds the
guidance scale is told 1, and few-step pipelines are trained at all levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from diffalign.data import Captioned, TensorCache, content_digest, open_fitted, read_captioned
from diffalign.finetune.config import SFTConfig
from diffalign.finetune.forward import denoising_error, training_level
from diffalign.laws.prediction import noised
from diffalign.ledger import Ledger
from diffalign.noise import Address, generator, normal, uniform
from diffalign.policies import Condition, Policy, StoredLatents


class SupervisedTerm:
    """What `sft` adds to the gradient of an update.

    Args:
        policy: that is trained.
        config: images, weight and batch.
        seed: of the draws.

    Raises FileNotFoundError and ValueError for a list that cannot be used.
    """

    def __init__(self, policy: Policy, config: SFTConfig, seed: int) -> None:
        self.policy, self.config, self.seed = policy, config, seed
        self.images = read_captioned(config.images)
        cache = None if config.cache is None else TensorCache(config.cache)
        if cache is not None:
            policy.keep_prompts(cache)
        self._latents = StoredLatents(policy, cache)
        self._digests: dict[int, str] = {}

    def accumulate(self, step: int, update: int, part: slice, at_once: int) -> tuple[Tensor, Ledger]:
        """Add the gradient of some images of an update's batch.

        Args:
            step: training steps before this one.
            update: optimiser updates of the step before this one.
            part: of the batch.
            at_once: images that are evaluated together.

        Returns:
            The sum of their errors, and the cost.
        """
        size = self.config.batch_size
        drawn = generator(self.seed, "sft", step, update).integers(len(self.images), size=size).tolist()
        rows = [(drawn[i], (step, update, i)) for i in range(size)[part]]
        total = torch.zeros((), device=self.policy.device)
        condition = self.policy.encode([self.images[number].caption for number, _ in rows])
        for start in range(0, len(rows), at_once):
            chunk = slice(start, min(start + at_once, len(rows)))
            error = self.error(*zip(*rows[chunk], strict=True), condition.rows(chunk)).sum()
            (self.config.weight / size * error).backward()
            total = total + error.detach()
        return total, Ledger(denoiser_evaluations=len(rows), backward_passes=len(rows))

    def error(self, numbers: Sequence[int], at: Sequence[Address], condition: Condition) -> Tensor:
        """(B,) denoising error of images by their number, each at a level and a noise by its address."""
        where = {"seed": self.seed, "purpose": "sft", "rows": at}
        latents = torch.stack([self._latent(number) for number in numbers]).to(self.policy.device)
        noise = normal(latents.shape[1:], device=self.policy.device, dtype=latents.dtype, **where)
        level = training_level(self.policy, uniform((), **where))
        prediction = self.policy.predict(noised(latents, noise, level), level, condition)
        return denoising_error(prediction, latents, noise)

    def _latent(self, number: int) -> Tensor:
        """(C, h, w) of an image, on the host; ValueError says where it is listed if it cannot be opened."""
        image = self.images[number]
        if number not in self._digests:
            self._digests[number] = content_digest(image.image)
        return self._latents(self._digests[number], partial(_opened, image))


def _opened(image: Captioned, size: tuple[int, int]) -> Tensor:
    try:
        return open_fitted(image.image, size)
    except ValueError as error:
        raise ValueError(f"{image.source}: {error} Mend the image, or take the line out.") from None
