"""Pairwise accuracy that counts predicted ties, and the threshold below which a difference of scores is one."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


class TieCalibration:
    """acc_eq with the best tie threshold (Deutsch, Foster and Freitag, 2023, arXiv:2305.14324, Algorithm 1).

    With threshold eps a pair is predicted to be a tie where |d| <= eps, and else goes to the larger score. acc_eq(eps)
    is the share of pairs whose label, a tie included, is predicted. eps is 0 or some |d|, whichever gives most, of
    equals the smallest: it is chosen on the very pairs that are judged, as the paper and VideoGen-RewardBench do, so
    it flatters each reward a little.

    The pairs are sorted once, O(N log N); each weighting, such as a resample, is then O(N).

    Departure from `calc_accuracy.py` of VideoAlign: that looks at the accuracy in the middle of a run of equal |d|,
    which no threshold gives, and begins at the smallest |d|, not at 0.

    Args:
        labels: (N,) 1 where the first is better, -1 where the second is, 0 for a tie.
        differences: (N,) finite, score of the first minus score of the second.
    """

    def __init__(self, labels: ArrayLike, differences: ArrayLike) -> None:
        labels, differences = np.asarray(labels), np.asarray(differences, dtype=np.float64)
        order = np.argsort(np.abs(differences), kind="stable")
        self.order = order
        self._sizes = np.abs(differences)[order]
        right = np.sign(differences[order]) * labels[order] > 0
        self._right = right.astype(np.float64)
        # What a pair adds when the threshold passes it: a tie becomes right, what was right becomes wrong.
        self._gains = (labels[order] == 0).astype(np.float64) - self._right
        # The last of each run of equal |d|; before all of them stands eps = 0, where it is not a |d| itself.
        self._ends = np.flatnonzero(np.append(self._sizes[1:] != self._sizes[:-1], True))

    def best(self, weights: NDArray | None = None) -> tuple[float, float]:
        """(accuracy, eps) with a weight >= 0 for each pair, all 1 by default; (NaN, NaN) where all weigh nothing.

        Args:
            weights: (N,), in the order of the arguments of the constructor.
        """
        weight = np.ones(len(self.order)) if weights is None else np.asarray(weights, dtype=np.float64)[self.order]
        total = weight.sum()
        if not total > 0:
            return np.nan, np.nan
        none_tied = float(weight @ self._right)
        found = none_tied + np.cumsum(weight * self._gains)[self._ends]
        sizes = self._sizes[self._ends]
        if sizes[0] > 0:
            found, sizes = np.append(none_tied, found), np.append(0.0, sizes)
        best = int(np.argmax(found))
        return float(found[best] / total), float(sizes[best])
