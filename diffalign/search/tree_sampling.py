r"""Diffusion Tree Sampling, DTS: a tree whose leaves are weighted samples of the target p(x_0) exp(lambda r(x_0)).

Draws descend by softmax(lambda v), which gives a leaf the weight exp(lambda r) / prod of the numbers of siblings on its
path: a tree that branches at the root alone is importance resampling, exactly.

While the tree grows, visits are shared among a node's children in proportion to

    softmax_c(share lambda_select r(x0_hat(x_c))) + 0.2 / number of children,    share = step of the children / N,

the next one going to the child that has had least of its share. That is, the predicted clean sample says where to look,
less so where there is much noise left, and rewards alone say what leaves weigh.

Source: Jain et al. 2025, "Diffusion Tree Sampling" (arXiv 2506.20701), algorithms 1 and 2. Departures, beside those of
`tree`:

- The paper draws the child from softmax(lambda v) by the values v themselves (`select_by: rollouts`). Lucky children
  are then visited again and regress, unlucky ones are not, and log Z stays too low at any budget in reach: on a ring of
  eight modes by 0.4 to 0.6 nats. What a node predicts is known before any rollout below it, so that to share by it
  leaves averages of exp(lambda r) unbiased, wherever it sends the visits. It costs a reward call for each new node.
- With `select_lambda: 0` visits are even, and nothing is asked of predictions.
- Nothing branches in the first third of the chain by default, where states say little of what they lead to.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from diffalign.search.base import SEARCHES
from diffalign.search.config import TreeSamplingConfig
from diffalign.search.particles import guesses_of, look_ahead, with_neutral
from diffalign.search.pool import Pool
from diffalign.search.space import Rows
from diffalign.search.tree import Node, Tree, TreeMethod, mark_of, soft_mean

_FLOOR = 0.2
"""What children share evenly, beside the 1 that they share by predictions: where these mislead, others are seen too."""


@SEARCHES.register("tree_sampling")
class TreeSampling(TreeMethod):
    """DTS: samples the target p(x_0) exp(lambda r(x_0))."""

    config_class = TreeSamplingConfig
    config: TreeSamplingConfig

    @property
    def _select_lambda(self) -> float:
        given = self.config.select_lambda
        return self.config.target_lambda if given is None else given

    @property
    def _guided(self) -> bool:
        return self.config.select_by == "predictions" and self._select_lambda > 0

    def guesses(self, tree: Tree, start: Node) -> int:
        """One for each new node that is no leaf, or as many as are drawn of a discrete chain."""
        new = len(tree.marks) - start.depth - 1
        return new * guesses_of(tree.space, self.config.guess_draws) if self._guided else 0

    def look(self, trees: list[Tree], chains: list[list[Node]]) -> None:
        """Score what the new nodes predict."""
        new = [(tree, node) for tree, chain in zip(trees, chains, strict=True) for node in chain[:-1]]
        if not new or not self._guided:
            return
        nodes, space = [node for _, node in new], trees[0].space
        steps = torch.tensor([mark_of(tree, node) for tree, node in new])
        rows = Rows(torch.stack([node.x for node in nodes]), steps, torch.tensor([tree.prompt for tree, _ in new]))
        outputs, paths = torch.stack([node.output for node in nodes]), [node.path for node in nodes]
        values = look_ahead(space, rows, outputs, paths, self._select_lambda, self.config.guess_draws)
        for node, value in zip(nodes, values.tolist(), strict=True):
            node.guess = value

    def choose(self, tree: Tree, node: Node, ready: list[Node]) -> Node:
        """The child that has had least of its share; by rollouts, one drawn from softmax(select_lambda v)."""
        if self.config.select_by == "rollouts":
            logits = self._select_lambda * np.array([child.value for child in ready])
            cumulative = np.exp(logits - logits.max()).cumsum()
            return ready[int(np.searchsorted(cumulative, tree.generator.random() * cumulative[-1], side="right"))]
        shares, visits = np.ones(len(ready)), np.array([child.visits for child in ready])
        guesses = torch.tensor([child.guess for child in ready], dtype=torch.float64)
        if not guesses.isnan().all():  # as leaves are, and all where predictions are not asked
            scale = mark_of(tree, ready[0]) / tree.space.num_steps
            shares = (scale * with_neutral(guesses)).softmax(0).numpy() + _FLOOR / len(ready)
        return ready[int(np.argmax(shares / visits))]

    def value(self, children: list[float]) -> float:
        """1/lambda log mean exp(lambda v); the mean where lambda is 0."""
        return soft_mean(np.array(children), self.config.target_lambda)

    def weigh(self, trees: list[Tree], pool: Pool) -> None:
        """A leaf's weight is the probability that a draw ends there, times Z."""
        scale = self.config.target_lambda
        for prompt, tree in enumerate(trees):
            found = np.full(pool.count(prompt), -math.inf)
            self._spread(tree.root, 0.0, found)
            root = tree.root.value
            pool.log_z[prompt] = None if root is None else scale * root
            pool.log_weights[prompt] = torch.from_numpy(found) + (0.0 if root is None else scale * root)

    def _spread(self, node: Node, log_share: float, found: np.ndarray) -> None:
        """Give every leaf below a node its share of the node's."""
        if node.leaf is not None:
            found[node.leaf] = log_share
            return
        ready = node.valued()
        pilots = self.config.sibling_values == "pilot"
        logits = self.config.target_lambda * np.array([child.pilot if pilots else child.value for child in ready])
        for child, log_part in zip(ready, logits - np.logaddexp.reduce(logits), strict=True):
            self._spread(child, log_share + log_part, found)
