"""What tests of training on tiny pipelines share: a reward, an adapter that is not zero, its gradient."""

import torch


def redness(images, prompts, metadata):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def perturb(policy, seed=1):
    """Moves the adapter off its zero initialisation, where half of its gradients vanish."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.trainable().values():
            p.add_(0.05 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p))


def gradient(t):
    """What a trainer's parameters hold, flat."""
    return torch.cat([p.grad.flatten() for p in t.parameters])


def draws_nan(t, rows, value=float("nan")):
    """Has some of the samples that an online trainer draws be not finite, in all that is recorded of them."""
    kept = t.sample

    def sample(*args):
        trajectory = kept(*args)
        means = [normal.mean for normal in trajectory.transitions or []]
        for tensor in [trajectory.latents, *(trajectory.states or []), *means]:
            tensor[rows] = value
        return trajectory

    t.sample = sample
