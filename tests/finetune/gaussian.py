"""A policy whose chain is Gaussian and whose optimum under a linear reward is known, to hold trainers to exact answers.

Data are N(0, 1) in one dimension; the exact prediction of x_0 plus one trained bias for each step is what the policy
predicts, so that it can move the mean of every step and nothing else. With r(x_0) = x_0 the soft value by backward
recursion is V_s(x) = g_s x + const, with g_0 = 1 at the end and g_t = g_s d mean_t / d x_t, and the optimum of
E[r] - beta sum_t KL_t moves the mean of each step by std_t^2 g_s / beta.
"""

from contextlib import contextmanager

import torch
from torch import nn

from diffalign.laws import Level, Prediction, diffusion_schedule, flow_schedule
from diffalign.policies import Condition, Policy


class Biases(nn.Module):
    """One bias of the predicted x_0 for each step."""

    def __init__(self, steps):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(steps))


class GaussianPolicy(Policy):
    """See the file; `kind` is that of the schedule."""

    pipeline_class, denoiser_name = "none", "biases"
    patch_size = 1

    def __init__(self, kind="diffusion", steps=5):
        self.biases, self.kind, self.steps, self.adapter = Biases(steps), kind, steps, True
        self.pipe, self.dtype, self._called = self, torch.float32, None

    def check(self):
        pass

    def schedule(self, num_inference_steps, height=None, width=None):
        if self.kind == "flow":
            sigmas = torch.linspace(1, 0, self.steps + 1, dtype=torch.float64)
            return flow_schedule(sigmas, 1000 * sigmas[:-1])
        cumulative = torch.linspace(0.9999, 0.001, 1000, dtype=torch.float64)
        return diffusion_schedule(cumulative, torch.linspace(999, 99, self.steps).long(), None, 1.0)

    def prediction_kind(self):
        return "sample"

    def encode(self, prompts):
        return Condition({"none": torch.zeros(len(prompts), 1)})

    def encode_one(self, prompt):
        return self.encode([prompt])

    def latent_shape(self, height=None, width=None):
        return 1, 1, 1

    def evaluate(self, x, timestep, condition):
        raise NotImplementedError

    def predict(self, x, level: Level, condition, guidance_scale=1.0, guidance="pipeline"):
        alpha, sigma = (each.reshape(-1, 1, 1, 1).to(x) for each in (level.alpha, level.sigma))
        x0 = alpha * x / (alpha**2 + sigma**2)
        if self.adapter:
            levels = self.schedule(self.steps)
            step = (levels.sigma[None].to(sigma) - sigma.reshape(-1, 1)).abs().argmin(1)
            x0 = x0 + self.biases.bias[step].reshape(-1, 1, 1, 1)
        return Prediction(x0, x, level, "sample")

    def decode(self, latents):
        return (0.5 + latents / 16).clamp(0, 1).expand(-1, 3, -1, -1)

    def trainable(self):
        return {"bias": self.biases.bias}

    def set_gradient_checkpointing(self, enabled):
        pass

    @contextmanager
    def reference(self):
        self.adapter = False
        try:
            yield
        finally:
            self.adapter = True


def reward(images, prompts, metadata):
    """x_0, but for its rounding to 8 bits."""
    return 16 * (images[:, 0, 0, 0] - 0.5)


def optimum(policy, law, beta):
    """(optimal shifts of the means, shifts now, standard deviations), each (N,) in float64."""
    schedule = policy.schedule(policy.steps)
    slopes, effects, stds = [], [], []
    for i in range(len(schedule)):
        level, target = schedule.level(i), schedule.target(i)
        alpha, sigma = float(level.alpha), float(level.sigma)

        def mean(x, bias, level=level, target=target, alpha=alpha, sigma=sigma):
            state = torch.full((1, 1, 1, 1), float(x), dtype=torch.float64)
            x0 = alpha * state / (alpha**2 + sigma**2) + bias
            return law.step(Prediction(x0, state, level.expand(1), "sample"), target.expand(1))

        slopes.append(float(mean(1, 0).mean - mean(0, 0).mean))
        effects.append(float(mean(0, 1).mean - mean(0, 0).mean))
        stds.append(float(mean(0, 0).std))
    gains = torch.tensor([*slopes[1:], 1.0], dtype=torch.float64).flip(0).cumprod(0).flip(0)
    stds = torch.tensor(stds, dtype=torch.float64)
    now = policy.biases.bias.detach().double() * torch.tensor(effects, dtype=torch.float64)
    return stds**2 * gains / beta, now, stds
