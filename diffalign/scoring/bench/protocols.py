"""What a data set's own authors report, where that is neither of the two accuracies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

_THRESHOLDS = np.arange(11) / 10


def inversion_accuracy(labels: ArrayLike, differences: ArrayLike, records: Sequence[int]) -> float:
    """1 - inversions / pairs of each ranking, averaged over rankings (HPSv2, `evaluate.py` of tgxs002/HPSv2).

    A pair that people tied is never an inversion. Departure: scores that are equal count as half an inversion, where
    the original ranks them in an order that its sort happens to give.

    Args:
        labels: (N,) 1, -1 or 0.
        differences: (N,) score of the first minus score of the second.
        records: (N,) which ranking each pair belongs to.
    """
    products = np.sign(np.asarray(differences, dtype=np.float64)) * np.asarray(labels)
    inverted = np.where(np.asarray(labels) == 0, 0.0, (1 - products) / 2)
    _, ranking = np.unique(np.asarray(records), return_inverse=True)
    return float(np.mean(1 - np.bincount(ranking, inverted) / np.bincount(ranking))) if len(inverted) else np.nan


def half_point_accuracy(
    labels: ArrayLike, differences: ArrayLike, validation_labels: ArrayLike, validation_differences: ArrayLike
) -> float:
    """PickScore's accuracy (Kirstain et al., 2023, arXiv:2305.01569; `eval_preference_predictor.py`).

    The scores of a pair become probabilities by a softmax, so their difference is |tanh(d / 2)|; up to a threshold
    it is a predicted tie. A right prediction has 1 point, one of label and prediction a tie 0.5. The threshold of
    0, 0.1, ..., 1 is the best of the validation split. It says something only of scores that are logits, as
    PickScore's are.

    Args:
        labels: (N,) 1, -1 or 0.
        differences: (N,) score of the first minus score of the second.
        validation_labels: (M,) those of the validation split, M > 0.
        validation_differences: (M,) those of the validation split.
    """
    found = [_points(validation_labels, validation_differences, threshold).mean() for threshold in _THRESHOLDS]
    points = _points(labels, differences, _THRESHOLDS[int(np.argmax(found))])
    return float(points.mean()) if len(points) else np.nan


def _points(labels: ArrayLike, differences: ArrayLike, threshold: float) -> NDArray:
    labels, differences = np.asarray(labels), np.asarray(differences, dtype=np.float64)
    predicted = np.where(np.abs(np.tanh(differences / 2)) <= threshold, 0, np.sign(differences))
    return np.where(predicted == labels, 1.0, np.where((predicted == 0) | (labels == 0), 0.5, 0.0))
