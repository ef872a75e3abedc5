"""The preference sets that can be read, where their copies have what, and what their authors report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from diffalign.registry import UnknownName
from diffalign.scoring.bench.hpdv3 import read_hpdv3
from diffalign.scoring.bench.pickapic import parquet_files, read_pickapic
from diffalign.scoring.bench.preferences import Preferences
from diffalign.scoring.bench.rankings import read_hpdv2, read_imagereward
from diffalign.scoring.bench.videogen import read_videogen


@dataclass(frozen=True)
class Dataset:
    """A published preference set.

    Attributes:
        name: on the command line.
        media: what is compared.
        read: (folder, images) -> its preferences.
        file: what the folder must have.
        expects: where the copy has what, in a sentence.
        protocol: which figure its authors report, in a sentence.
        column: the figure that is neither of the two accuracies.
    """

    name: str
    media: Literal["image", "video"]
    read: Callable[[Path, Path | None], Preferences]
    file: str
    expects: str
    protocol: str
    column: Literal["inversions", "half points"] | None = None


DATASETS = {
    dataset.name: dataset
    for dataset in (
        Dataset(
            "imagereward",
            "image",
            read_imagereward,
            "test.json",
            "ImageRewardDB is expected as test.json (data/test.json of github.com/THUDM/ImageReward) beside "
            "test_images, the unpacked test_images.zip of huggingface.co/THUDM/ImageReward",
            "its authors report the accuracy over all pairs that people did not tie (test.py of THUDM/ImageReward)",
        ),
        Dataset(
            "hpdv2",
            "image",
            read_hpdv2,
            "test.json",
            "HPDv2 is expected as test.json beside test, the unpacked test.tar.gz, both of "
            "huggingface.co/datasets/ymhao/HPDv2",
            "its authors report 1 - inversions / pairs, averaged over rankings (evaluate.py of tgxs002/HPSv2)",
            "inversions",
        ),
        Dataset(
            "pickapic",
            "image",
            read_pickapic,
            "test_unique-*.parquet",
            "Pick-a-Pic is expected as the parquet files test_unique-*.parquet, and validation_unique-*.parquet for "
            "the published figure, in the folder or in its data, as in "
            "huggingface.co/datasets/yuvalkirstain/pickapic_v2",
            "its authors report half points for ties, with the threshold that is best on validation_unique "
            "(eval_preference_predictor.py of yuvalkirstain/PickScore)",
            "half points",
        ),
        Dataset(
            "hpdv3",
            "image",
            read_hpdv3,
            "test.json",
            "HPDv3 is expected as test.json beside images, the unpacked images.tar.gz.*, both of "
            "huggingface.co/datasets/MizzenAI/HPDv3",
            "its authors report the accuracy over all pairs; their script was not seen",
        ),
        Dataset(
            "videogen",
            "video",
            read_videogen,
            "videogen-rewardbench.csv",
            "VideoGen-RewardBench is expected as videogen-rewardbench.csv beside videos, the unpacked videos.zip, both "
            "of huggingface.co/datasets/KwaiVGI/VideoGen-RewardBench",
            "its authors report both accuracies (calc_accuracy.py of KwaiVGI/VideoAlign)",
        ),
    )
}


def find_dataset(name: str) -> Dataset:
    """The set of that name; UnknownName tells those that there are."""
    if name not in DATASETS:
        raise UnknownName("preference set", name, DATASETS)
    return DATASETS[name]


def check_folder(dataset: Dataset, folder: Path) -> None:
    """Refuses a folder that is no copy of the set: FileNotFoundError says what is expected where."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: {dataset.expects}.")
    there = parquet_files(folder, "test_unique") if dataset.name == "pickapic" else (folder / dataset.file).is_file()
    if not there:
        raise FileNotFoundError(f"{folder} has no {dataset.file}: {dataset.expects}.")
