"""A finite chain whose policy has a number for every step: optima, fixed points and gradients are sums over its paths.

Two tokens of three words are unmasked in three steps. A state is the pair of tokens, one of 4^2 = 16; the base is
`MaskedDiffusion` with a fixed table of logits, and the policy adds a trained number to the log-probability of each
next state. So it can be any chain over the transitions that the base can do, where one over independent tokens could
not reach the optimum. States travel through the rollouts as float64 "latents" of one element.
"""

import itertools

import torch
from torch import nn

from diffalign.laws import Categorical, Law, Level, MaskedDiffusion, Prediction, flow_schedule
from tests.finetune.exact_policy import ExactPolicy

WORDS, LENGTH, STEPS = 3, 2, 3
MASK = WORDS
STATES = torch.tensor(list(itertools.product(range(WORDS + 1), repeat=LENGTH)))
START = len(STATES) - 1  # all masks
SIGMAS = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64)


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def masked_chain():
    """(N, S, S) the base's probabilities from every state to every other, at each step."""
    logits, law, schedule = draw(len(STATES), LENGTH, WORDS + 1, seed=5), MaskedDiffusion(MASK), _schedule()
    steps = []
    for i in range(STEPS):
        at = (each.expand(len(STATES)) for each in (schedule.level(i), schedule.target(i)))
        step = law.step(logits, STATES, *at)
        steps.append(torch.stack([step.log_prob(state.expand_as(STATES), "sum").exp() for state in STATES], 1))
    return torch.stack(steps)


def chain_in_order():
    """Likewise of three other steps: the first draws the first token, the second the second, the third it again."""
    steps, drawn = torch.zeros(STEPS, len(STATES), len(STATES), dtype=torch.float64), draw(STEPS, WORDS, seed=6)
    for i, at in enumerate((0, 1, 1)):
        for j, state in enumerate(STATES):
            for word, p in enumerate(drawn[i].softmax(0)):
                to = state.clone()
                to[at] = word
                steps[i, j, (to * torch.tensor([WORDS + 1, 1])).sum()] = p
    return steps


def _schedule():
    return flow_schedule(SIGMAS, 1000 * SIGMAS[:-1])


class NextState(Categorical):
    """Of one token, the state; drawn by the normal noise that a rollout brings."""

    def sample(self, noise):
        return super().sample(torch.special.ndtr(noise).flatten(1)).reshape(noise.shape).to(noise)

    def _of(self, tokens):
        return super()._of(tokens.flatten(1).long())


class TableLaw(Law):
    """The prediction is the log-probabilities of the next state."""

    marginal_preserving, memoryless = False, True

    def std(self, level, to):
        return torch.ones_like(to.sigma)  # every step is random

    def step(self, prediction, to):
        return NextState(prediction.output)


class OfTable:
    """Before a trainer: its steps are those of the table."""

    def law(self):
        return TableLaw()


def of_table(method):
    return type(method.__name__, (OfTable, method), {})


class Table(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(shape, dtype=torch.float64))


class TabularPolicy(ExactPolicy):
    """log p(y | x) at a step = log base(y | x) + table(x, y), normalised; everything in float64."""

    denoiser_name = "module"

    def __init__(self, base=None):
        self.base = masked_chain() if base is None else base
        self.module, self.adapter, self.pipe = Table(self.base.shape), True, self
        self.dtype, self._called = torch.float64, None

    def schedule(self, num_inference_steps, height=None, width=None):
        return _schedule()

    def latent_shape(self, height=None, width=None):
        return 1, 1, 1

    def initial_latents(self, noise):
        return torch.full_like(noise, START)

    def log_probs(self):
        """(N, S, S), as the adapter is now."""
        return (self.base.log() + self.module.table * self.adapter).log_softmax(-1)

    def predict(self, x, level: Level, condition, guidance_scale=1.0, guidance="pipeline"):
        step = (SIGMAS[None] - level.sigma[:, None]).abs().argmin(1)
        return Prediction(self.log_probs()[step, x.flatten().long()][:, None], x, level, "sample")

    def decode(self, latents):
        return (latents / 255).expand(-1, 3, -1, -1)

    def trainable(self):
        return {"table": self.module.table}


def reward_of(values):
    """The reward of images that hold a state, by a table (S,)."""

    def reward(images, prompts, metadata):
        return values[(255 * images[:, 0, 0, 0]).round().long()]

    return reward


def chain_kl(own, other):
    """KL of two chains (N, S, S) of probabilities, from the start on."""
    reached, total = torch.zeros(len(STATES), dtype=torch.float64), 0.0
    reached[START] = 1
    for p, q in zip(own, other, strict=True):
        total += float((reached @ torch.where(p > 0, p * (p / q).log(), 0.0)).sum())
        reached = reached @ p
    return total


def results(chain):
    """(S,) probabilities of the chain's result."""
    return torch.linalg.multi_dot([*chain, torch.eye(len(STATES), dtype=torch.float64)])[START]


def optimum(base, rewards, beta):
    """The chain (N, S, S) of the greatest E[r] - beta KL, by backward recursion of the soft value V / beta."""
    value, steps = rewards / beta, []
    for p in base.flip(0):
        tilted = p * value.exp()
        value = tilted.sum(1).log()
        steps.append(tilted / tilted.sum(1, keepdim=True))
    return torch.stack(steps[::-1])


def optimum_of_steps(base, rewards, beta):
    """The chain in which no step can gain by E[r] - beta KL of its own, whatever it brings on later steps.

    Backward recursion of the plain value W(x) = E[r | x] under the chain: p(y | x) is base(y | x) exp(W(y) / beta),
    normalised, where the optimum has the soft value in the place of W.
    """
    value, steps = rewards, []
    for p in base.flip(0):
        tilted = p * (value / beta).exp()
        steps.append(tilted / tilted.sum(1, keepdim=True))
        value = steps[-1] @ value
    return torch.stack(steps[::-1])
