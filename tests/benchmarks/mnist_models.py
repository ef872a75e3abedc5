"""The models of `tests.benchmarks.mnist`: a diffusion prior of digits, and two classifiers that share no image.

Images are the 10,000 of MNIST's t10k files: 28 x 28 pixels, averaged over 2 x 2 to 14 x 14, in [-1, 1].
The last 1,000 are seen by no model. The prior learns from the 9,000 others, the reward's classifier from one half of
them and the judge's from the other half.
"""

import gzip
import math
import struct

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from diffalign.noise import generator

SIDE, CLASSES, HELD_OUT = 14, 10, 1000


def read_idx(path):
    """The array of bytes of a gzipped idx file."""
    with gzip.open(path) as file:
        kind, rank = struct.unpack(">HBB", file.read(4))[1:]
        if kind != 8:
            raise ValueError(f"{path} holds type {kind:#x} where unsigned bytes, 0x8, are expected: give MNIST's files")
        shape = struct.unpack(f">{rank}I", file.read(4 * rank))
        return np.frombuffer(file.read(), dtype=np.uint8).reshape(shape)


def read_digits(folder):
    """(images (N, 1, 14, 14) in [-1, 1], labels (N,)) in an order that is the same for every run."""
    images, labels = (read_idx(folder / f"t10k-{name}-ubyte.gz") for name in ("images-idx3", "labels-idx1"))
    order = generator(0, "mnist").permutation(len(images))
    small = F.avg_pool2d(torch.from_numpy(images[order]).float()[:, None] / 127.5 - 1, 2)
    return small, torch.from_numpy(labels[order]).long()


class Denoiser(nn.Module):
    """Residual perceptron of the pixels, told the angle in [0, 1] of the cosine schedule; predicts v.

    On one core, in bfloat16, it is evaluated four to eight times as often in a second as diffusers' U-Nets of 16 to 64
    channels on 8 x 8, which makes a million evaluations of every method affordable.
    """

    def __init__(self, width=512, blocks=4):
        super().__init__()
        self.enter, self.leave = nn.Linear(SIDE**2, width), nn.Linear(width, SIDE**2)
        self.time, self.last = nn.Linear(64, 128), nn.LayerNorm(width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks))
        self.scales = nn.ModuleList(nn.Linear(128, 2 * width) for _ in range(blocks))
        self.first = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.second = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        for layer in self.second:  # blocks begin as the identity
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.register_buffer("frequencies", torch.exp(torch.linspace(0, math.log(200), 32)))

    def forward(self, x, angle):
        """V (B, 1, 14, 14) of noisy images (B, 1, 14, 14) at angles (B,)."""
        waves = angle.float()[:, None] * self.frequencies.float()
        told = F.silu(self.time(torch.cat([waves.sin(), waves.cos()], 1).to(x.dtype)))
        state = self.enter(x.flatten(1))
        for norm, scale, first, second in zip(self.norms, self.scales, self.first, self.second, strict=True):
            factor, shift = scale(told).chunk(2, 1)
            state = state + second(F.silu(first(norm(state) * (1 + factor) + shift)))
        return self.leave(self.last(state)).reshape(x.shape)


class RewardClassifier(nn.Module):
    """Two 5 x 5 convolutions and a linear layer, as the paper's, but with strides for a fast gradient on a CPU."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.ReLU()),
            *(nn.Conv2d(16, 32, 5, stride=2, padding=2), nn.ReLU(), nn.Flatten()),
        )
        self.head = nn.Linear(32 * 4 * 4, CLASSES)

    def forward(self, x):
        """Logits (B, 10) of images (B, 1, 14, 14)."""
        return self.head(self.body(x))


class JudgeClassifier(nn.Module):
    """Three 3 x 3 convolutions by strides, with normalisation; its 32 last features measure sets of images."""

    def __init__(self):
        super().__init__()
        sizes = ((1, 24), (24, 48), (48, 64))
        layers = [
            layer
            for before, after in sizes
            for layer in (nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.GELU())
        ]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.2), nn.Linear(64 * 2 * 2, 32))
        self.head = nn.Linear(32, CLASSES)

    def features(self, x):
        """(B, 32) of images (B, 1, 14, 14)."""
        return self.body(x)

    def forward(self, x):
        """Logits (B, 10) of images (B, 1, 14, 14)."""
        return self.head(F.gelu(self.body(x)))


def train(model, loss, size, steps, batch, learning_rate):
    """Minimise loss(model, indices (batch,)) over random indices below `size`; the learning rate falls to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1, k / 100) * (1 - k / steps))
    model.train()
    for step in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(model, torch.randint(size, (batch,)))
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 500 == 0:
            print(f"{type(model).__name__} step {step}: {value.item():.4f}", flush=True)


def denoising(images):
    """The loss of v at uniform angles."""

    def loss(model, index):
        clean, angle = images[index], torch.rand(len(index))
        noise, turned = torch.randn_like(clean), (angle * math.pi / 2)[:, None, None, None]
        alpha, sigma = turned.cos(), turned.sin()
        v = model(alpha * clean + sigma * noise, angle)
        return F.mse_loss(v.float(), alpha * noise - sigma * clean)

    return loss


def classifying(images, labels):
    """Cross-entropy."""
    return lambda model, index: F.cross_entropy(model(images[index]).float(), labels[index])


def accuracy(model, images, labels):
    """Share of images whose highest logit is their label's."""
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())


def models(folder, out, steps):
    """(denoiser in bfloat16, reward's classifier, judge), from `out` where they are already, else trained and kept.

    Args:
        folder: of MNIST's t10k files.
        out: where checkpoints are.
        steps: of the denoiser's training, of 256 images each; the classifiers take a tenth, of 128.
    """
    images, labels = read_digits(folder)
    known, half = images[:-HELD_OUT], (len(images) - HELD_OUT) // 2
    tasks = {
        "denoiser": (Denoiser, denoising(known), len(known), steps, 256, 1.5e-3),
        "reward": (RewardClassifier, classifying(known[:half], labels[:half]), half, steps // 10, 128, 1e-3),
        "judge": (JudgeClassifier, classifying(known[half:], labels[half:-HELD_OUT]), half, steps // 10, 128, 1e-3),
    }
    made = []
    for name, (build, loss, size, count, batch, rate) in tasks.items():
        path = out / f"{name}.safetensors"
        torch.manual_seed(0)
        model = build()
        if path.exists():
            model.load_state_dict(load_file(path))
        else:
            train(model, loss, size, count, batch, rate)
            save_file(model.state_dict(), path)
        made.append(model.eval().requires_grad_(False))
    for name, model in zip(("reward", "judge"), made[1:], strict=True):
        print(f"{name}: {accuracy(model, images[-HELD_OUT:], labels[-HELD_OUT:]):.1%} of {HELD_OUT} held-out images")
    return made[0].bfloat16(), made[1], made[2]
