"""Policies whose chains are Gaussian and whose optima are known, to hold trainers to exact answers.

Data are N(0, 1) in each element; the exact prediction of x_0 plus one trained bias for each step is what the policy
predicts, so that it can move the mean of every step and nothing else; `AffinePolicy` has a slope for each step too.

With r(x_0) = x_0 the soft value by backward recursion is V_s(x) = g_s x + const, with g_0 = 1 at the end and g_t = g_s
d mean_t / d x_t, and the optimum of E[r] - beta sum_t KL_t moves the mean of each step by std_t^2 g_s / beta.
"""

import torch
from torch import nn

from diffalign.laws import Level, Prediction, diffusion_schedule, flow_schedule
from tests.finetune.exact_policy import ExactPolicy


class Biases(nn.Module):
    """One bias of the predicted x_0 for each step."""

    def __init__(self, steps):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(steps))


class GaussianPolicy(ExactPolicy):
    """See the file; `kind` is that of the schedule."""

    denoiser_name = "biases"

    def __init__(self, kind="diffusion", steps=5, side=1):
        self.side = side
        self.biases, self.kind, self.steps, self.adapter = Biases(steps), kind, steps, True
        self.pipe, self.dtype, self._called = self, torch.float32, None

    def schedule(self, num_inference_steps, height=None, width=None):
        if self.kind == "flow":
            sigmas = torch.linspace(1, 0, self.steps + 1, dtype=torch.float64)
            return flow_schedule(sigmas, 1000 * sigmas[:-1])
        cumulative = torch.linspace(0.9999, 0.001, 1000, dtype=torch.float64)
        return diffusion_schedule(cumulative, torch.linspace(999, 99, self.steps).long(), None, 1.0)

    def latent_shape(self, height=None, width=None):
        return 1, self.side, self.side

    def predict(self, x, level: Level, condition, guidance_scale=1.0, guidance="pipeline"):
        alpha, sigma = (each.reshape(-1, 1, 1, 1).to(x) for each in (level.alpha, level.sigma))
        x0 = alpha * x / (alpha**2 + sigma**2)
        if self.adapter:
            levels = self.schedule(self.steps)
            step = (levels.sigma[None].to(sigma) - sigma.reshape(-1, 1)).abs().argmin(1)
            x0 = x0 + self.learned(x, step)
        return Prediction(x0, x, level, "sample")

    def learned(self, x, step):
        return self.biases.bias[step].reshape(-1, 1, 1, 1)

    def decode(self, latents):
        return (0.5 + latents / 16).clamp(0, 1).expand(-1, 3, -1, -1)

    def trainable(self):
        return {"bias": self.biases.bias}


class AffinePolicy(GaussianPolicy):
    """With one trained slope for each step beside its bias: any Gaussian data have their exact prediction here."""

    def __init__(self, kind="diffusion", steps=5):
        super().__init__(kind, steps)
        self.biases.slope = nn.Parameter(torch.zeros(steps))

    def learned(self, x, step):
        return super().learned(x, step) + self.biases.slope[step].reshape(-1, 1, 1, 1) * x

    def trainable(self):
        return dict(self.biases.named_parameters())

    @torch.no_grad()
    def fit(self, mean, variance):
        """Make the prediction that of data N(mean, variance), exactly."""
        schedule = self.schedule(self.steps)
        alpha, sigma = schedule.alpha[:-1], schedule.sigma[:-1]
        slope = alpha * variance / (alpha**2 * variance + sigma**2)
        self.biases.slope.copy_(slope - alpha / (alpha**2 + sigma**2))
        self.biases.bias.copy_(mean * (1 - alpha * slope))


def reward(images, prompts, metadata):
    """The mean of x_0, but for its rounding to 8 bits."""
    return 16 * (images[:, 0].mean((1, 2)) - 0.5)


def chain(policy, law):
    """Of each step its mean at x = 0, d mean / d x, d mean / d bias and standard deviation, (N,) each in float64."""
    schedule, rows = policy.schedule(policy.steps), []
    for i in range(len(schedule)):
        level, target = schedule.level(i), schedule.target(i)

        def step(x, more=0.0, level=level, target=target):
            state = torch.full((1, 1, 1, 1), x, dtype=torch.float64)
            told = policy.predict(state, level, None)
            return law.step(Prediction(told.output + more, state, level, told.kind), target)

        with torch.no_grad():
            zero = step(0.0)
            rows.append([zero.mean, step(1.0).mean - zero.mean, step(0.0, 1.0).mean - zero.mean, zero.std])
    return torch.tensor(rows, dtype=torch.float64).unbind(1)


def optimum(policy, law, beta):
    """(optimal shifts of the means, shifts now, standard deviations), each (N,) in float64."""
    _, slopes, effects, stds = chain(policy, law)
    gains = torch.cat([slopes[1:], slopes.new_ones(1)]).flip(0).cumprod(0).flip(0)
    return stds**2 * gains / beta, policy.biases.bias.detach().double() * effects, stds


def result(policy, law, split=0):
    """Of x_0: its mean, and its standard deviations from what happens before the step `split` and from it on."""
    mean, before, after = torch.tensor([0.0, 1.0, 0.0]).double()
    for i, (offset, slope, _, std) in enumerate(zip(*chain(policy, law), strict=True)):
        mean, before, after = slope * mean + offset, slope**2 * before, slope**2 * after
        before, after = (before + std**2, after) if i < split else (before, after + std**2)
    return float(mean), float(before.sqrt()), float(after.sqrt())
