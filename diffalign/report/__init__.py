"""What came of a run: figures with intervals, curves, galleries, and one page that holds them all."""

from diffalign.report.gallery import before_after
from diffalign.report.page import write_grid, write_report
from diffalign.report.statistics import (
    Diversity,
    Figure,
    bootstrap_interval,
    compare,
    diversity,
    is_oracle,
    wilson_interval,
)
from diffalign.report.summary import Pair, Summary

__all__ = [
    "Diversity",
    "Figure",
    "Pair",
    "Summary",
    "before_after",
    "bootstrap_interval",
    "compare",
    "diversity",
    "is_oracle",
    "wilson_interval",
    "write_grid",
    "write_report",
]
