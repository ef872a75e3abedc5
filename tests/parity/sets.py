"""Set rewards beside torchmetrics, torch-fidelity, prdc, vendi-score and clip-mmd, in an environment of their own.

    python -m venv ENV
    ENV/bin/pip install torch==2.13.0 torchmetrics==1.9.0 scikit-learn==1.9.1 scipy==1.17.1 tqdm pillow
    ENV/bin/pip install --no-deps torchvision==0.28.0 torch-fidelity==0.4.0 prdc==0.2 vendi-score==0.0.3 clip-mmd==0.0.2
    python tests/parity/sets.py write FILE.npz
    ENV/bin/python tests/parity/sets.py compare FILE.npz

The first command needs diffalign, and writes features and what diffalign makes of them; the second needs none, gives
the same features to the peers and prints one JSON line. Nothing is done to the packages; torchvision's missing
schemas are declared where its wheel lies beside a torch without CUDA.
"""

from __future__ import annotations

import contextlib
import json
import sys
from importlib.metadata import version

import numpy as np

SEED, SUBSETS, SIZE = 2020, 20, 30
NEIGHBOURS = 4
# name -> (samples, exemplars, dimensions); the second has covariances of less than full rank
CASES = {"many": (200, 300, 48), "few": (36, 50, 96)}


def features(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Skewed and correlated, as those of networks are, float64."""
    samples, exemplars, width = CASES[name]
    draw = np.random.RandomState(samples)
    mix = draw.randn(width, width) / width**0.5
    x, y = (np.abs(draw.randn(count, width) @ mix) ** 1.5 for count in (samples, exemplars))
    return 1.2 * x + 0.05, y


def write(path: str) -> None:
    """Features and the distances and scores that diffalign gives them, as arrays."""
    import torch

    from diffalign.rewards import sets

    arrays = {}
    for name in CASES:
        x, y = features(name)
        arrays |= {f"{name}.features": x, f"{name}.reference": y}
        x, y = torch.from_numpy(x), torch.from_numpy(y)
        rewards = {
            "frechet": sets.FrechetReward(y),
            "kid": sets.KIDReward(y[: len(x)]),  # the peers take as many exemplars as samples
            "cmmd": sets.CMMDReward(y),
            "vendi": sets.VendiReward(),
            "precision": sets.PrecisionReward(y, k=NEIGHBOURS),
            "recall": sets.RecallReward(y, k=NEIGHBOURS),
            "density": sets.DensityReward(y, k=NEIGHBOURS),
            "coverage": sets.CoverageReward(y, k=NEIGHBOURS),
        }
        for metric, reward in rewards.items():
            sign = -1 if metric in ("frechet", "kid", "cmmd") else 1
            score = reward(x)
            arrays |= {f"{name}.{metric}": sign * score.value.numpy()}
            arrays |= {f"{name}.{metric} credit": sign * score.credit.numpy()}
        first, second = (sets.FeatureStatistics.of(side) for side in (x, y))
        arrays[f"{name}.frechet of statistics"] = sets.frechet_distance(first, second).numpy()
        mean, deviation = sets.kid_of_subsets(x, y, subsets=SUBSETS, size=SIZE, seed=SEED)
        arrays |= {f"{name}.kid of subsets": np.array(mean), f"{name}.kid deviation": np.array(deviation)}
    np.savez(path, **arrays)


def by_torchmetrics(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    import torch
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    same = torch.nn.Identity()
    same.num_features = x.shape[1]
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    frechet = FrechetInceptionDistance(feature=same).set_dtype(torch.float64)
    kid = KernelInceptionDistance(feature=same, subsets=1, subset_size=len(x))
    for metric, exemplars in ((frechet, y), (kid, y[: len(x)])):
        metric.update(x, real=False)
        metric.update(exemplars, real=True)
    distance = float(frechet.compute())
    return {"frechet": distance, "frechet of statistics": distance, "kid": float(kid.compute()[0])}


def by_torch_fidelity(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    import torch
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    x, y = torch.from_numpy(x), torch.from_numpy(y)
    distance = fid_statistics_to_metric(fid_features_to_statistics(x), fid_features_to_statistics(y), verbose=False)
    quiet = {"verbose": False, "save_cpu_ram": False}
    kid = kid_features_to_metric(x, y, kid_subsets=SUBSETS, kid_subset_size=SIZE, rng_seed=SEED, **quiet)
    shares = prc_features_to_metric(x, y, prc_neighborhood=NEIGHBOURS, **quiet)  # the samples first, since 0.4
    return {
        "frechet": distance["frechet_inception_distance"],
        "kid of subsets": kid["kernel_inception_distance_mean"],
        "kid deviation": kid["kernel_inception_distance_std"],
        "precision": shares["precision"],
        "recall": shares["recall"],
    }


def import_torchvision() -> None:
    """Its wheel is built for CUDA; beside a CPU torch its Python part works once two schemas are declared."""
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        kept.append(torch.library.Library("torchvision", "DEF"))
        kept[-1].define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        kept[-1].define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


kept: list = []  # torch drops the schemas of a Library that is collected


def by_prdc(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    from prdc import compute_prdc

    return compute_prdc(real_features=y, fake_features=x, nearest_k=NEIGHBOURS)


def by_vendi_score(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    from vendi_score import vendi

    return {"vendi": vendi.score_X(x)}


def by_clip_mmd(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    from clip_mmd.calculation import mmd

    x, y = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (x, y))
    return {"cmmd": float(mmd(x, y))}


PEERS = {
    "torchmetrics": by_torchmetrics,
    "torch-fidelity": by_torch_fidelity,
    "prdc": by_prdc,
    "vendi-score": by_vendi_score,
    "clip-mmd": by_clip_mmd,
}
# what a peer says of the set without each sample in turn
CREDITS = {
    "torch-fidelity": ("frechet",),
    "prdc": ("precision", "recall", "density", "coverage"),
    "vendi-score": ("vendi",),
    "clip-mmd": ("cmmd",),
}


def compare(path: str) -> dict:
    """For each peer its version and, for each metric, the largest relative difference over the cases.

    A credit's difference is relative to the largest credit of its set.
    """
    import_torchvision()
    ours = np.load(path, allow_pickle=False)
    peers = []
    for peer, function in PEERS.items():
        found: dict[str, float] = {}
        for case in CASES:
            x, y = ours[f"{case}.features"], ours[f"{case}.reference"]
            whole = function(x, y)
            theirs = {metric: np.asarray(value) for metric, value in whole.items()}
            if case == "few" and peer in CREDITS:
                rest = [function(np.delete(x, i, axis=0), y) for i in range(len(x))]
                for metric in CREDITS[peer]:
                    theirs[f"{metric} credit"] = np.array([whole[metric] - one[metric] for one in rest])
            for metric, value in theirs.items():
                difference = np.abs(ours[f"{case}.{metric}"] - value).max() / max(np.abs(value).max(), 1e-300)
                found[metric] = max(found.get(metric, 0.0), float(difference))
        peers.append({"name": peer, "version": version(peer), "largest_relative_difference": found})
    return {"peers": peers}


if __name__ == "__main__":
    command, file = sys.argv[1:]
    if command == "write":
        write(file)
    else:
        with contextlib.redirect_stdout(sys.stderr):  # some peers talk
            result = compare(file)
        print(json.dumps(result))
