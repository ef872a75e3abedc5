"""What a search's report draws: the best reward over the budget, beside best-of-n, and trees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffalign.report.charts import GRID, LINE, MUTED, SECOND, Chart, canvas, finish, label_ends
from diffalign.report.statistics import expected_best

Trace = Mapping[str, NDArray]
"""Arrays of one prompt's search, by the names of `diffalign.engine.search_trace`."""

AXES = {"nfe": "denoiser evaluations", "reward_calls": "reward calls", "seconds": "seconds"}
POINTS = 120
MOST_NODES = 900
SHADES = (0.12, 0.25, 0.4, 0.6, 0.8, 1.0)


def anytime(traces: Sequence[Trace], method: str) -> list[Chart]:
    """The best reward so far of a prompt, averaged over prompts, over each unit of cost.

    Beside it, where there are independent samples (`pool/`), stands what the best of n of them has on average over
    their order, exactly: see `expected_best`. Prompts without a result are left out.
    """
    traces = [trace for trace in traces if len(trace["rewards"])]
    charts = [_anytime(traces, axis, method) for axis in AXES] if traces else []
    return [chart for chart in charts if chart is not None]


def _anytime(traces: Sequence[Trace], axis: str, method: str) -> Chart | None:
    start, end = max(trace[axis][0] for trace in traces), max(trace[axis][-1] for trace in traces)
    pools = [trace for trace in traces if len(trace.get("pool/rewards", ()))]
    if start <= 0 or (end <= start and len(pools) < len(traces)):
        return None
    figure, axes = canvas()
    labels = [(method, SECOND)]
    if len(pools) == len(traces):
        axes.plot(*best_of_n_curve(pools, axis), color=LINE, lw=1.4)
        labels.append(("best of n, expected", LINE))
    x = np.geomspace(start, end, POINTS) if end > start else np.array([start])
    y = np.mean([so_far(trace, axis, x) for trace in traces], axis=0)
    axes.plot(x, y, color=SECOND, lw=1.9, marker="" if len(x) > 1 else "o", ms=5, solid_capstyle="round")
    _log_scale(axes)
    label_ends(axes, labels)
    return finish(figure, axes, f"Over {AXES[axis]}", axis, xlabel=f"{AXES[axis]} of a prompt")


def _log_scale(axes: Any) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")


def so_far(trace: Trace, axis: str, x: ArrayLike) -> NDArray:
    """The best reward at each cost x, none of which is below that of the first result."""
    return np.maximum.accumulate(trace["rewards"])[np.searchsorted(trace[axis], x, side="right") - 1]


def best_of_n_curve(pools: Sequence[Trace], axis: str) -> tuple[NDArray, NDArray]:
    """(cost, expected best reward), averaged over prompts, for n up to the smallest pool."""
    most = min(len(pool["pool/rewards"]) for pool in pools)
    counts = np.unique(np.geomspace(1, most, POINTS).round().astype(int))
    place = list(AXES).index(axis)
    # A sample whose score failed has cost too.
    costs = np.mean([pool["pool/cost"][place] / len(pool["pool/rewards"]) for pool in pools])
    return counts * costs, np.mean([expected_best(pool["pool/rewards"], counts) for pool in pools], axis=0)


def tree(trace: Trace, title: str) -> Chart | None:
    """A prompt's tree, the root above, or None where its search has none.

    Darker nodes have a higher value; the path to the best leaf is marked. Of a large tree the most visited branches
    of the root are drawn.

    Args:
        trace: of the prompt.
        title: of the picture.
    """
    if len(trace.get("tree/parent", ())) < 2:
        return None
    parent, visits, value = (trace[f"tree/{name}"] for name in ("parent", "visits", "value"))
    kept = largest_branches(parent, visits, MOST_NODES)
    told = f"{len(parent):,} nodes" if len(kept) == len(parent) else f"{len(kept):,} of {len(parent):,} nodes"
    parent, value = np.searchsorted(kept, parent[kept]), value[kept]  # parents stand before children, so 0 is the root
    depth = depths(parent)
    x, shade = leaf_order(parent, depth), _shades(value)
    figure, axes = canvas(9.2, 0.55 + 0.5 * depth.max())
    for level, alpha in enumerate(SHADES):
        at = np.flatnonzero((shade == level) & (depth > 0))
        if len(at):
            lines = np.stack([x[parent[at]], x[at], np.full(len(at), np.nan)], 1).ravel()
            heights = np.stack([depth[parent[at]], depth[at], np.full(len(at), np.nan)], 1).ravel()
            axes.plot(lines, heights, color=LINE, lw=0.5, alpha=alpha, zorder=2 + level)
            axes.plot(x[at], depth[at], "o", color=LINE, mec="none", ms=3.2, alpha=alpha, zorder=9 + level)
    path = best_path(parent, depth, value)
    axes.plot(x[path], depth[path], color=SECOND, lw=1.5, marker="o", ms=3.8, mec="none", zorder=20)
    axes.grid(axis="y", color=GRID, lw=0.7)
    axes.spines["bottom"].set_visible(False)
    axes.set_xticks([])
    steps = trace["tree/marks"].tolist()
    names = ["noise" if step == 0 else f"step {step}" for step in steps[:-1]] + ["image"]
    axes.set_yticks(range(1, len(names) + 1), names, color=MUTED)
    axes.set_ylim(depth.max() + 0.25, -0.25)
    return finish(figure, axes, title, told, xlabel="")


def largest_branches(parent: NDArray, visits: NDArray, most: int) -> NDArray:
    """Indices, ascending, of the root and of its most visited branches with at most so many nodes (at least one)."""
    branch = np.arange(len(parent))
    for node in range(1, len(parent)):
        branch[node] = node if parent[node] == 0 else branch[parent[node]]
    heads = np.flatnonzero(parent == 0)
    heads = heads[np.argsort(-visits[heads], kind="stable")]
    sizes = 1 + np.bincount(branch, minlength=len(parent))[heads].cumsum()
    return np.flatnonzero(np.isin(branch, [0, *heads[: max(1, int((sizes <= most).sum()))]]))


def depths(parent: NDArray) -> NDArray:
    """The depth of each node, 0 for the root; parents stand before their children, the root's own parent is any."""
    depth = np.zeros(len(parent), dtype=int)
    for node in range(1, len(parent)):
        depth[node] = depth[parent[node]] + 1
    return depth


def leaf_order(parent: NDArray, depth: NDArray) -> NDArray:
    """A place for each node: ends of branches side by side, and every other node in the middle of its children."""
    children: list[list[int]] = [[] for _ in parent]
    for node in range(1, len(parent)):
        children[parent[node]].append(node)
    x, stack, count = np.zeros(len(parent)), [0], 0
    while stack:
        node = stack.pop()
        if not children[node]:
            x[node], count = count, count + 1
        stack += reversed(children[node])
    for node in np.argsort(-depth, kind="stable"):
        if children[node]:
            x[node] = np.mean(x[children[node]])
    return x


def best_path(parent: NDArray, depth: NDArray, value: NDArray) -> list[int]:
    """Nodes from the root to the leaf of the highest value."""
    leaves = np.flatnonzero((depth == depth.max()) & np.isfinite(value))
    path = [int(leaves[value[leaves].argmax()])] if len(leaves) else [0]
    while path[-1]:
        path.append(int(parent[path[-1]]))
    return path[::-1]


def _shades(value: NDArray) -> NDArray:
    """The index in `SHADES` of each value, by rank; 0 where there is none."""
    rank = np.zeros(len(value), dtype=int)
    known = np.isfinite(value)
    rank[known] = np.searchsorted(np.sort(value[known]), value[known], side="left") * len(SHADES) // max(1, known.sum())
    return rank
