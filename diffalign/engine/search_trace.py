"""What is kept of one prompt's search: its row, and how it went as tensors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from diffalign.data import Prompt
from diffalign.engine.evaluate import Evaluation
from diffalign.search import Found


def result_row(prompt: Prompt, found: Found, base: Evaluation, best: Evaluation, i: int, reward: str) -> dict[str, Any]:
    """The row of a prompt in `results.jsonl`, without its files.

    Args:
        prompt: what was searched for.
        found: what was found.
        base: plain images, scored by the search's reward and the held-out ones.
        best: found images, scored by the held-out rewards.
        i: the prompt's place in both.
        reward: the name of the search's reward.
    """
    nothing = found.best_image is None
    heldout = {
        name: {"base": float(base.scores[name][i]), "found": math.nan if nothing else float(values[i])}
        for name, values in best.scores.items()
    }
    count = len(base.prompts)
    return {
        "id": prompt.id,
        "prompt": prompt.text,
        "base_reward": float(base.scores[reward][i]),
        "found_reward": found.reward,
        "heldout": heldout,
        "results": len(found),
        "log_z": found.log_z,
        **found.ledger.as_dict(),
        "apart": {
            "nfe": base.ledger.denoiser_evaluations // count,
            "decodes": 1,
            "reward_calls": (base.ledger.reward_calls + best.ledger.reward_calls) // count,
        },
    }


def trace_tensors(found: Found, prompts: int, independent: Found | None, tree: Any) -> dict[str, Tensor]:
    """How a search went: (n,) tensors over its results, over nodes (`tree/`), and over independent samples (`pool/`).

    Args:
        found: of one prompt.
        prompts: how many were searched side by side; each has its share of the seconds.
        independent: independent samples of the same prompt, or None.
        tree: the prompt's tree, or nothing.
    """
    tensors = {"rewards": found.rewards, "nfe": found.nfe, "reward_calls": found.reward_calls}
    tensors["seconds"] = found.seconds / prompts
    if found.log_weights is not None:
        tensors["log_weights"] = found.log_weights
    if independent is not None:
        ledger = independent.ledger
        tensors["pool/rewards"] = independent.rewards
        cost = [ledger.denoiser_evaluations, ledger.reward_calls, ledger.seconds]
        tensors["pool/cost"] = torch.tensor(cost, dtype=torch.float64)
    return tensors | (tree_tensors(tree) if tree else {})


def tree_tensors(tree: Any) -> dict[str, Tensor]:
    """The nodes of a tree, parents first: index of the parent (-1 for the root), visits, value (NaN for none).

    `tree/marks` are the steps before which the nodes of depth 1, 2, ... stand.
    """
    nodes, parents = [tree.root], [-1]
    for index, node in enumerate(nodes):  # grows while it is read
        nodes += node.children
        parents += [index] * len(node.children)
    values = [math.nan if node.value is None else node.value for node in nodes]
    return {
        "tree/marks": torch.tensor(tree.marks),
        "tree/parent": torch.tensor(parents),
        "tree/visits": torch.tensor([node.visits for node in nodes]),
        "tree/value": torch.tensor(values, dtype=torch.float64),
    }
