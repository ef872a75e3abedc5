"""The cost of a run, in the units that every method reports."""

from dataclasses import dataclass


@dataclass
class Ledger:
    """Counted cost. Counts are totals over images, so that runs of different batch sizes compare.

    Attributes:
        denoiser_evaluations: denoiser evaluations; one image under classifier-free guidance costs two a step.
        backward_passes: backward passes through a denoiser evaluation.
        decodes: images decoded.
        reward_calls: images scored, once for each reward.
        reward_failures: scores that failed.
        seconds: wall-clock time.
        peak_memory_bytes: largest memory in use; the maximum, not the sum, when ledgers are added.
    """

    denoiser_evaluations: int = 0
    backward_passes: int = 0
    decodes: int = 0
    reward_calls: int = 0
    reward_failures: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0

    def add(self, other: "Ledger") -> None:
        """Add another ledger's cost to this one."""
        self.denoiser_evaluations += other.denoiser_evaluations
        self.backward_passes += other.backward_passes
        self.decodes += other.decodes
        self.reward_calls += other.reward_calls
        self.reward_failures += other.reward_failures
        self.seconds += other.seconds
        self.peak_memory_bytes = max(self.peak_memory_bytes, other.peak_memory_bytes)

    def __add__(self, other: "Ledger") -> "Ledger":
        total = Ledger()
        total.add(self)
        total.add(other)
        return total

    def as_dict(self) -> dict[str, int | float]:
        """Return the cost under the names of ``metrics.jsonl``."""
        return {
            "nfe": self.denoiser_evaluations,
            "backward_passes": self.backward_passes,
            "decodes": self.decodes,
            "reward_calls": self.reward_calls,
            "reward_failures": self.reward_failures,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
        }
