"""The metrics of a run: one JSON row a step in `metrics.jsonl`, and the trackers that a recipe reports to."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, filter_trackers

logger = logging.getLogger(__name__)

FILE = "metrics.jsonl"


class Metrics:
    """Writes rows to `output_dir/metrics.jsonl` and to trackers, on the main process only.

    A tracker that fails later on, as one does whose server is gone, is left out from there with a warning: a run does
    not end for it.

    Args:
        output_dir: the run's folder.
        report_to: names of accelerate's trackers; tensorboard writes to `output_dir/tensorboard`.
        resume_step: rows after this step are dropped, so that the steps which are done again are not there twice;
            with 0 all are.
        accelerator: of the run; its trackers are started here and ended by `close`.

    Raises:
        ValueError: a tracker does not start.
    """

    def __init__(
        self,
        output_dir: str | Path,
        report_to: Sequence[str] = (),
        *,
        resume_step: int = 0,
        accelerator: Accelerator | None = None,
    ) -> None:
        self._file: TextIO | None = None
        self._accelerator = accelerator or Accelerator()
        if report_to:
            self._start(report_to, str(Path(output_dir) / "tensorboard"), resume_step)
        if self._accelerator.is_main_process:
            path = Path(output_dir) / FILE
            path.parent.mkdir(parents=True, exist_ok=True)
            truncate(path, resume_step)
            self._file = path.open("a", encoding="utf-8")

    def _start(self, report_to: Sequence[str], folder: str, resume_step: int) -> None:
        accelerator = self._accelerator
        accelerator.project_configuration.logging_dir = folder
        accelerator.log_with = filter_trackers(list(report_to), logging_dir=folder)
        purge = {"tensorboard": {"purge_step": resume_step + 1}} if resume_step else {}
        try:
            accelerator.init_trackers("diffalign", init_kwargs=purge)
        except Exception as error:  # of whatever library the tracker is
            raise ValueError(
                f"report_to {list(report_to)}: a tracker does not start ({type(error).__name__}: {error}); mend it, or "
                "leave it out: metrics.jsonl is written anyway"
            ) from error

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes one row; it has a `step`. Numbers that are not finite become null, which JSON can hold.

        The row is on disk when this returns: a step takes much longer than the sync, and a checkpoint of this step,
        which is synced too, must find its row after a power cut.
        """
        if self._file is not None:
            self._write(json.dumps({key: _finite(value) for key, value in row.items()}, allow_nan=False) + "\n")
        scalars = {key: value for key, value in row.items() if key != "step" and isinstance(value, int | float)}
        self._tell_all(lambda tracker: tracker.log(scalars, step=int(row["step"])))

    def _write(self, line: str) -> None:
        assert self._file is not None
        try:
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError:
            with suppress(OSError):  # what is buffered would be written, and refused, once more
                self._file.close()
            raise

    def _tell_all(self, tell: Callable[[GeneralTracker], object]) -> None:
        for tracker in list(self._accelerator.trackers):
            try:
                tell(tracker)
            except Exception as error:  # of whatever library the tracker is
                self._accelerator.trackers.remove(tracker)
                logger.warning(
                    "tracker %s failed (%s: %s) and is left out from here on; metrics.jsonl has every row",
                    tracker.name,
                    type(error).__name__,
                    error,
                )

    def close(self) -> None:
        """Closes the file and the trackers."""
        self._tell_all(lambda tracker: tracker.finish())
        if self._file is not None:
            self._file.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The whole rows of a metrics file; a last line that a crash cut off is left out."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        rows.append(json.loads(line))
    return rows


def truncate(path: Path, step: int) -> None:
    """Leaves the rows up to `step`, none for step 0, in one operation: a crash leaves the old file or the new one."""
    if not path.exists():
        return
    kept = [row for row in read_metrics(path) if step and row["step"] <= step]
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
