r"""Diffusion Tree Sampling and Search: every rollout is kept in a tree that the next one may branch from.

With p the chain, r the reward and V_t the soft value,

    V_t(x) = 1/lambda log E_p[exp(lambda r(x_0)) | x_t = x]
           = 1/lambda log E_{x_{t-1}}[exp(lambda V_{t-1}(x_{t-1}))],

a node holds a state and an estimate v of its value. One turn:

1. selection, from the root: a node of N visits that has fewer than C N^alpha children gets a new one (progressive
   widening), else the descent goes on in one of its children;
2. expansion and rollout: the chain is run to its end, and each state that it passes at a branch level becomes a node;
3. backup: v of the leaf is its reward, and upwards v = 1/lambda log mean_children exp(lambda v), or their maximum.

`tree_sampling` and `tree_search` say which child, and what a tree is worth.

Source: Jain et al. 2025, "Diffusion Tree Sampling" (arXiv 2506.20701), algorithms 1 and 2. Departures of both methods:

- `leaf_batch` leaves of each prompt, and all prompts, are rolled out in one batch. Visits are counted when a path is
  chosen and not when it comes back, and only nodes with a value can be chosen, so that rows under way repel each other.
- The prediction at a node is kept beside its state: k children cost one evaluation for their first step.
- The best leaf is kept whatever the values say.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from diffalign.noise import generator
from diffalign.search.base import Search
from diffalign.search.budget import Budget
from diffalign.search.config import TreeSamplingConfig, TreeSearchConfig
from diffalign.search.pool import Pool
from diffalign.search.space import Path, Rows, Space

_IDLE = 100
"""After so many paths to leaves that are there already, the last one's parent gets a child, however narrow the tree."""


class Node:
    """A state of the tree; the root is before the noise is drawn.

    Attributes:
        parent: None for the root.
        path: numbers of the children on the way here.
        depth: 0 for the root.
        children: in the order of their making.
        visits: chosen paths that led through here, those under way included.
        value: v, None until a rollout through here has a reward.
        pilot: the reward of the first rollout through here.
        guess: lambda r of the clean sample predicted here, where the method asks for it; NaN where it failed.
        x: the state, None while the first rollout is under way.
        output: the network's output at the state; None at a leaf.
        leaf: index of the result in the pool, of a leaf.
    """

    __slots__ = ("children", "depth", "guess", "leaf", "output", "parent", "path", "pilot", "value", "visits", "x")

    def __init__(self, parent: Node | None = None) -> None:
        self.parent, self.children = parent, []
        self.path: Path = () if parent is None else (*parent.path, len(parent.children))
        self.depth = 0 if parent is None else parent.depth + 1
        if parent is not None:
            parent.children.append(self)
        self.visits = 1
        self.value: float | None = None
        self.pilot: float | None = None
        self.guess = math.nan
        self.x: Tensor | None = None
        self.output: Tensor | None = None
        self.leaf: int | None = None

    def valued(self) -> list[Node]:
        """The children that have a value."""
        return [child for child in self.children if child.value is not None]


class Tree:
    """The tree of one prompt.

    Attributes:
        marks: the steps before which the nodes of depth 1, 2, ... stand; the last is the end of the chain.
    """

    def __init__(self, space: Space, prompt: int, marks: Sequence[int]) -> None:
        self.space, self.prompt, self.marks = space, prompt, marks
        self.root = Node()
        self.generator = generator(space.seed, "tree", space.ids[prompt])
        self.low, self.high = math.inf, -math.inf

    def cost(self, start: Node) -> int:
        """Denoiser evaluations of a rollout from a node."""
        first = 0 if start.parent is None else self.marks[start.depth - 1] + 1
        return sum(self.space.evaluations[first:])

    def grow(self, start: Node) -> list[Node]:
        """Nodes without state from below a node to a new leaf."""
        chain = [Node(start)]
        while chain[-1].depth < len(self.marks):
            chain.append(Node(chain[-1]))
        return chain


class TreeMethod(Search):
    """What sampling and searching share: how a tree grows."""

    config: TreeSamplingConfig | TreeSearchConfig

    def check(self, space: Space) -> None:
        """Refuse branch levels with nothing random before the next: their children would be equal."""
        marks = self._marks(space)
        for mark, following in itertools.pairwise(marks):
            if not any(space.stochastic[mark:following]):
                raise ValueError(
                    f"branch_levels = {self.config.branch_levels}: no step from {mark} to {following} is random, so "
                    "children there are equal; use a stochastic law (eta above 0), or leave the level out"
                )

    def _marks(self, space: Space) -> list[int]:
        steps = {round(level * space.num_steps) for level in self.config.branch_levels}
        return [*sorted(steps - {space.num_steps}), space.num_steps]

    @torch.no_grad()
    def explore(self, space: Space, budget: Budget, pool: Pool) -> Iterator[None]:
        """Grow every prompt's tree by `leaf_batch` leaves a round."""
        trees = [Tree(space, prompt, self._marks(space)) for prompt in range(space.num_prompts)]
        budget.chains(space, 1 + self.guesses(trees[0], trees[0].root))
        pool.trees = trees
        pool.weigh = lambda: self.weigh(trees, pool)
        while True:
            grown = [(tree, chain) for tree in trees for chain in self._grow(tree, budget)]
            if not grown:
                return
            owners, chains = [tree for tree, _ in grown], [chain for _, chain in grown]
            results, prompts = roll_out(space, owners, chains)
            rewards = space.score(results, prompts)
            leaves = pool.add(results, rewards, prompts)
            self.look(owners, chains)
            for tree, chain, reward, leaf in zip(owners, chains, rewards.tolist(), leaves, strict=True):
                if leaf is not None:
                    chain[-1].leaf = leaf
                    self._back_up(tree, chain[-1], reward)
            yield

    def _grow(self, tree: Tree, budget: Budget) -> Iterator[list[Node]]:
        """New chains of nodes, as many as the round has leaves and the budget pays for."""
        nfe = scores = 0
        for _ in range(self.config.leaf_batch):
            node = self._select(tree)
            nfe, scores = nfe + tree.cost(node), scores + 1 + self.guesses(tree, node)
            if not budget.affords(tree.space, tree.prompt, nfe, scores):
                return
            yield tree.grow(node)

    def _select(self, tree: Tree) -> Node:
        """The node that gets a new child; visits along the way are counted."""
        node, idle = tree.root, 0
        while True:
            node.visits += 1
            ready = node.valued()
            if node.depth == len(tree.marks):  # a leaf, reached again: nothing to compute, and another path is chosen
                idle += 1
                if idle == _IDLE:
                    return node.parent  # type: ignore[return-value]
                node = tree.root
            elif not ready or len(node.children) < self.config.widening * node.visits**self.config.widening_alpha:
                return node
            else:
                node = self.choose(tree, node, ready)

    def _back_up(self, tree: Tree, leaf: Node, reward: float) -> None:
        tree.low, tree.high = min(tree.low, reward), max(tree.high, reward)
        leaf.value, node = reward, leaf
        while node is not None:
            if node.pilot is None:
                node.pilot = reward
            if node.children:
                node.value = self.value([child.value for child in node.valued()])
            node = node.parent

    def guesses(self, tree: Tree, start: Node) -> int:
        """How many predicted samples `look` scores after a rollout from a node."""
        return 0

    def look(self, trees: list[Tree], chains: list[list[Node]]) -> None:
        """Ask what the new nodes may lead to, where `choose` wants to know."""

    def choose(self, tree: Tree, node: Node, ready: list[Node]) -> Node:
        """The child to descend to."""
        raise NotImplementedError

    def value(self, children: list[float]) -> float:
        """The value of a node from those of its children."""
        raise NotImplementedError

    def weigh(self, trees: list[Tree], pool: Pool) -> None:
        """Set the weights of the leaves, where there are any."""


def roll_out(space: Space, trees: list[Tree], chains: list[list[Node]]) -> tuple[Tensor, Tensor]:
    """Run every chain of new nodes from its branching node to its end, all in one batch.

    Returns:
        (results, prompts), a row for each chain.
    """
    rows, outputs = _first(space, trees, chains)
    alive, left = list(range(len(chains))), [[node for node in chain if node.x is None] for chain in chains]
    results: list[Tensor | None] = [None] * len(chains)
    while alive:
        rows = space.advance(rows, outputs, [left[k][0].path for k in alive])
        passed = [(i, left[k].pop(0)) for i, k in enumerate(alive) if mark_of(trees[k], left[k][0]) == rows.steps[i]]
        for i, node in passed:
            node.x = rows.x[i].clone()
        for i, k in enumerate(alive):
            if not left[k]:
                results[k] = rows.x[i]
        onward = [i for i, k in enumerate(alive) if left[k]]
        if not onward:
            break
        place = {i: j for j, i in enumerate(onward)}
        alive, rows = [alive[i] for i in onward], rows[onward]
        outputs = space.predict(rows)
        for i, node in passed:
            if i in place:
                node.output = outputs[place[i]].clone()
    return torch.stack(results), torch.tensor([tree.prompt for tree in trees])  # type: ignore[arg-type]


def _first(space: Space, trees: list[Tree], chains: list[list[Node]]) -> tuple[Rows, Tensor]:
    """The states that the chains start from, and the network's output there."""
    starts = [chain[0].parent for chain in chains]
    new = [k for k, start in enumerate(starts) if start.parent is None]  # type: ignore[union-attr]
    rows: list[Rows | None] = [None] * len(chains)
    outputs: list[Tensor | None] = [start.output for start in starts]  # type: ignore[union-attr]
    if new:
        first = space.initial(torch.tensor([trees[k].prompt for k in new]), [chains[k][0].path for k in new])
        predicted = space.predict(first)
        for i, k in enumerate(new):
            rows[k], outputs[k] = first[[i]], predicted[i]
            if trees[k].marks[0] == 0:  # the noise itself is a node
                node = chains[k][0]
                node.x, node.output = first.x[i].clone(), predicted[i].clone()
    for k, start in enumerate(starts):
        if rows[k] is None:
            at = torch.tensor([mark_of(trees[k], start)]), torch.tensor([trees[k].prompt])  # type: ignore[arg-type]
            rows[k] = Rows(start.x[None], *at)  # type: ignore[union-attr,index]
    return Rows.cat(rows), torch.stack(outputs)  # type: ignore[arg-type]


def mark_of(tree: Tree, node: Node) -> int:
    """The step before which a node stands."""
    return tree.marks[node.depth - 1]


def soft_mean(values: np.ndarray, scale: float) -> float:
    """1/scale log mean exp(scale values); the mean where scale is 0."""
    if scale == 0:
        return float(values.mean())
    return float(np.logaddexp.reduce(scale * values) - math.log(len(values))) / scale
