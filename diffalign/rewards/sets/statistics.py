"""Count, mean and scatter of features: all that a Frechet distance needs of a set, gathered as a stream."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass(frozen=True)
class FeatureStatistics:
    """Sufficient statistics of a Gaussian fitted to n feature vectors, in float64.

    ``FeatureStatistics.of(first) + FeatureStatistics.of(second)`` are those of both sets together, by the pairwise
    update of Chan, Golub and LeVeque (1983): streams and processes may be merged in any order.

    Attributes:
        count: n.
        mean: (D,).
        scatter: (D, D), sum_i (x_i - mean)(x_i - mean)^T.
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Self:
        """Of features (n, D), n at least 1."""
        if features.ndim != 2 or not len(features) or not features.is_floating_point():
            raise ValueError(f"statistics are of floating features (n, D), not of {tuple(features.shape)}.")
        if not features.isfinite().all():
            raise ValueError("features are not all finite: leave out the samples that failed before their statistics.")
        features = features.detach().double()
        mean = features.mean(dim=0)
        centred = features - mean
        return cls(len(features), mean, centred.T @ centred)

    def __add__(self, other: FeatureStatistics) -> FeatureStatistics:
        if not isinstance(other, FeatureStatistics):
            return NotImplemented
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"statistics of {len(self.mean)} and of {len(other.mean)} dimensions cannot be merged.")
        count = self.count + other.count
        step = other.mean - self.mean
        between = torch.outer(step, step) * (self.count * other.count / count)
        return FeatureStatistics(
            count, self.mean + step * (other.count / count), self.scatter + other.scatter + between
        )

    @property
    def covariance(self) -> Tensor:
        """(D, D), scatter / (n - 1); zero for a single vector."""
        return self.scatter / max(self.count - 1, 1)

    @cached_property
    def factor(self) -> Tensor:
        """(D, rank) with ``factor @ factor.T == covariance``, from its eigenvectors; one column at least.

        Eigenvalues below D eps times the largest are rounding errors of zero and are left out, so a set of fewer
        vectors than dimensions needs no ridge.
        """
        # inference_mode(False): what is kept may meet autograd later
        with torch.inference_mode(False), torch.no_grad():
            eigenvalues, vectors = torch.linalg.eigh(self.covariance)
            kept = eigenvalues > eigenvalues[-1] * len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps
            kept[-1] = True
            return vectors[:, kept] * eigenvalues[kept].clamp(min=0).sqrt()

    def to(self, device: torch.device | str) -> FeatureStatistics:
        """The same on another device."""
        return FeatureStatistics(self.count, self.mean.to(device), self.scatter.to(device))

    def save(self, path: str | Path) -> None:
        """Writes safetensors: count, mean, scatter."""
        tensors = {"count": torch.tensor(self.count), "mean": self.mean, "scatter": self.scatter}
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads what ``save`` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file holds something else.
        """
        try:
            tensors = load_file(path)
            count, mean, scatter = (tensors[name] for name in ("count", "mean", "scatter"))
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path} holds no feature statistics ({error}): write them by `save`.") from None
        if count.ndim or int(count) < 1 or mean.ndim != 1 or scatter.shape != (len(mean), len(mean)):
            raise ValueError(f"{path} holds no feature statistics (shapes {mean.shape}, {scatter.shape}).")
        return cls(int(count), mean.double(), scatter.double())
