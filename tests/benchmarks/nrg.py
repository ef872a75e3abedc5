"""Noisy reward guidance on the zoo: a noise-aware reward beside a clean-trained one, and two objectives mixed.

    python -m tests.benchmarks.nrg --out runs/nrg [--work runs/zoo/shapes-noisy-reward]

`shapes-sd3` in ten deterministic steps without classifier-free guidance, on the same noise in every row. The
noise-aware heads are those of `zoo:shapes-noisy-reward`; the clean-trained ones differ in one thing, that they learned
on clean latents alone. They are trained here from the same samples, which are drawn first: an hour of one core, once,
resumable; `--work` may name the folder in which `python -m diffalign.zoo shapes-noisy-reward` left them.

What counts is measured on 8-bit images: the oracle, what the labeller of `preference` likes (without mistakes), and
warmth itself. Each pair of heads is compared at equal scale w, and at equal achieved reward: the oracle of the
noise-aware ones less that read off the line through the clean-trained ones' points, intervals over prompts.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from diffalign.data import read_prompts
from diffalign.policies import Policy
from diffalign.registry import data_root
from diffalign.report import compare
from diffalign.rewards import noisy as noisy_rewards
from diffalign.search import Budget, PolicySpace
from diffalign.search.config import ChainConfig
from diffalign.search.nrg import NRG
from diffalign.zoo import noisy
from diffalign.zoo.oracle import judge
from diffalign.zoo.preference import utility

MEASURES = ("oracle", "preference", "warmth")
SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)
"""Of preference in the mix; the rest is warmth."""
STEPS = 10


LATE = ", t below 0.7"
"""Of heads that do not guide the first steps, in which they push most and know least."""


class Late(NRG):
    """Leaves the first steps unguided."""

    def guided(self, space):
        return [step for step in super().guided(space) if space.schedule.sigma[step] < 0.7]


class Truth:
    """What is true of every image that it is asked about, in `rows`, (B, 3) a call, in the order of `MEASURES`."""

    def __init__(self):
        self.rows = []

    def __call__(self, images, prompts, metadata):
        images = images.detach().float().cpu()
        correct = judge(images, prompts).all_correct.float()
        self.rows.append(torch.stack([correct, utility(images, prompts), noisy.warmth(images)], 1))
        return correct


def clean_trained(policy, work):
    """The folder of heads that learned on clean latents alone; trained where it is not there."""
    folder = work / "clean-heads"
    if not (folder / "config.json").exists():
        drawn = noisy.collect(policy, "train", work / "samples")
        margins = noisy_rewards.tie_margins(drawn["values"], noisy.TIES)
        learned = noisy.choices(drawn, "train", margins, mistakes=True)
        noisy.train(policy, learned, work / "clean", "clean")[0].save(folder)
    return folder


def sample(policy, prompts, method, heads, share, scale, samples):
    """What is true of samples guided by `method`, (P, S, 3), and seconds; scale 0 is plain sampling."""
    chain = ChainConfig(num_inference_steps=STEPS, guidance_scale=1.0, eta=0.0, micro_batch_size=64)
    truth = Truth()
    space = PolicySpace(policy, truth, prompts, chain)
    weights = {"preference": share, "warmth": 1 - share}
    search = method(noisy_reward=str(heads), weights=weights, scale=scale, wave=samples)
    started = time.perf_counter()
    search.run(space, Budget(nfe=samples * sum(space.evaluations)))
    return torch.cat(truth.rows).view(len(prompts), samples, -1).tolist(), time.perf_counter() - started


def pushes(policy, prompts, folders):
    """How far each objective moves a latent in each step at w = 1, (steps, K), by heads; on the way of plain samples.

    Lengths of (sigma / alpha) grad r times the step in sigma, means over one sample of each prompt.
    """
    chain = ChainConfig(num_inference_steps=STEPS, guidance_scale=1.0, eta=0.0)
    space = PolicySpace(policy, Truth(), prompts, chain)
    loaded = {name: noisy_rewards.NoisyReward.load(folder, policy) for name, folder in folders.items()}
    table = {name: torch.zeros(STEPS, len(noisy.OBJECTIVES)) for name in folders}
    rows = space.initial(torch.arange(len(prompts)), [(0,)] * len(prompts))
    for step in range(STEPS):
        sigma, alpha = float(space.schedule.sigma[step]), float(space.schedule.alpha[step])
        level = space.schedule.level(rows.steps, policy.device)
        for name, reward in loaded.items() if alpha > 0 else ():
            x = rows.x.detach().requires_grad_()
            scores = reward.scores(x, level, space.condition).sum(0)
            for k, score in enumerate(scores):
                (gradient,) = torch.autograd.grad(score, x, retain_graph=True)
                length = gradient.flatten(1).norm(dim=1).mean()
                table[name][step, k] = length * sigma / alpha * (sigma - float(space.schedule.target_sigma[step]))
        with torch.no_grad():
            rows = space.advance(rows, space.predict(rows), [(0,)] * len(prompts))
    return {name: found.tolist() for name, found in table.items()}


def plan(scales, front):
    """(heads, share of preference, scale) of every row: each objective alone at every scale, and the mixes at one."""
    rows = [("plain", 1.0, 0.0)]
    for heads in ("noise-aware", "clean-trained"):
        rows += [(heads, share, scale) for share in (1.0, 0.0) for scale in scales]
        rows += [(heads, share, front) for share in SHARES if not (share in (1.0, 0.0) and front in scales)]
        rows += [(heads + LATE, 0.0, scale) for scale in (front, scales[-1])]
    return rows


def key(heads, share, scale):
    """The name of a row."""
    return f"{heads}, preference {share:g}, warmth {1 - share:g}, w {scale:g}"


def differ(a, b, measure, count):
    """Mean of b less a, paired over prompts and noise, with its 95 % interval."""
    k = MEASURES.index(measure)
    ids = [p for p in range(len(a)) for _ in range(count)]
    found = compare(measure, "heldout", a[..., k].ravel(), b[..., k].ravel(), ids)
    return found.difference, found.low, found.high


def told(figure, percent=False):
    """A difference in words."""
    unit = 100 if percent else 1
    mean, low, high = (f"{unit * each:+.{1 if percent else 3}f}" for each in figure)
    return f"{mean} ({low} to {high})"


def at_equal_reward(aware, curve, measure, resamples=2000):
    """The oracle's mean on `aware` (P, S, 3) less that on a line through `curve` at the same achieved reward.

    `curve` (W, P, S, 3) has ascending scales, the first 0; it is read as far as its reward rises. Returns the
    difference and its 95 % bootstrap interval over prompts, or None where the line has no such reward.
    """
    k, draws = MEASURES.index(measure), np.random.default_rng(0).integers(len(aware), size=(resamples, len(aware)))

    def difference(prompts):
        line, point = curve[:, prompts].mean((1, 2)), aware[prompts].mean((0, 1))
        rising = int(line[:, k].argmax()) + 1
        if not line[0, k] <= point[k] <= line[rising - 1, k]:
            return np.nan
        order = np.argsort(line[:rising, k], kind="stable")
        return point[0] - np.interp(point[k], line[order, k], line[order, 0])

    mean, many = difference(np.arange(len(aware))), np.array([difference(each) for each in draws])
    if np.isnan(mean) or np.isnan(many).mean() > 0.05:  # the line ends too near to say how sure it is
        return None if np.isnan(mean) else (float(mean), np.nan, np.nan)
    return float(mean), *(float(each) for each in np.nanpercentile(many, [2.5, 97.5]))


def print_tables(rows, scales, count):
    """Every row, and each pair of heads at equal scale and at equal reward."""
    plain = rows[key("plain", 1.0, 0.0)]
    for name, row in rows.items():
        means = dict(zip(MEASURES, row.mean((0, 1)), strict=True))
        moved = "; ".join(f"{m} {told(differ(plain, row, m, count), m == 'oracle')}" for m in MEASURES)
        print(f"{name}: oracle {means['oracle']:.1%}, {means['preference']:.3f}, {means['warmth']:.4f}; moved: {moved}")
    for share, measure in ((1.0, "preference"), (0.0, "warmth")):
        curve = np.stack([plain, *(rows[key("clean-trained", share, w)] for w in scales)])
        for place, scale in enumerate(scales, 1):
            aware, clean = rows[key("noise-aware", share, scale)], curve[place]
            equal = at_equal_reward(aware, curve, measure)
            print(
                f"{measure} at w {scale:g}, aware less clean: {measure} {told(differ(clean, aware, measure, count))}, "
                f"oracle {told(differ(clean, aware, 'oracle', count), True)}; at equal {measure} oracle "
                f"{'not to be read: no such point on the line of clean' if equal is None else told(equal, True)}"
            )
    for heads in ("noise-aware", "clean-trained"):
        whole, late = (rows[key(each, 0.0, scales[-1])] for each in (heads, heads + LATE))
        moved = "; ".join(f"{m} {told(differ(whole, late, m, count), m == 'oracle')}" for m in MEASURES)
        print(f"{heads}, warmth at w {scales[-1]:g}, t below 0.7 less all steps: {moved}")


def draw(rows, scales, front, path):
    """The front of the two objectives, and the oracle against achieved warmth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.3), layout="constrained")
    plain = rows[key("plain", 1.0, 0.0)].mean((0, 1))
    colours = {"noise-aware": "#c8501e", "clean-trained": "#3a6ea5"}
    for heads, colour in colours.items():
        style = {"color": colour, "marker": "o", "markersize": 5, "label": heads}
        under = heads == "noise-aware"  # its lines lie below the other's
        labels = {"color": colour, "fontsize": 8, "textcoords": "offset points", "ha": "right" if under else "left"}
        labels["xytext"] = (-5, -11) if under else (6, 4)
        points = np.array([rows[key(heads, share, front)].mean((0, 1)) for share in SHARES])
        left.plot(points[:, 1], points[:, 2], **style)
        for share, point in zip(SHARES[1:], points[1:], strict=True):  # the first ones lie too near to each other
            left.annotate(f"{share:g}", point[1:], **labels)
        line = np.array([plain, *(rows[key(heads, 0.0, w)].mean((0, 1)) for w in scales)])
        right.plot(line[:, 2], 100 * line[:, 0], **style)
        for w, point in zip(scales, line[1:], strict=True):
            right.annotate(f"w {w:g}", (point[2], 100 * point[0]), **labels)
        late = np.array([rows[key(heads + LATE, 0.0, w)].mean((0, 1)) for w in (front, scales[-1])])
        right.plot(late[:, 2], 100 * late[:, 0], "s", color=colour, fillstyle="none", label=heads + LATE)
    left.plot(plain[1], plain[2], "k*", markersize=11, label="plain", linestyle="none")
    right.plot(plain[2], 100 * plain[0], "k*", markersize=11, label="plain", linestyle="none")
    left.set(xlabel="what the labeller likes", ylabel="warmth", title=f"mixes at w {front:g}, share of preference")
    right.set(xlabel="warmth", ylabel="oracle: all correct, %", title="warmth alone, by scale")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.margins(0.12)
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=2, help="of each prompt")
    parser.add_argument("--scales", type=float, nargs="+", default=[0.5, 1, 2, 3, 10])
    parser.add_argument("--front", type=float, default=3, help="scale of the mixes")
    parser.add_argument("--out", type=Path, default=Path("runs/nrg"))
    parser.add_argument("--work", type=Path, default=Path("runs/zoo/shapes-noisy-reward"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    policy = Policy.from_pretrained("zoo:shapes-sd3")
    policy.set_max_sequence_length(16)  # the zoo's T5 says nothing, and may be short
    aware = data_root() / "zoo" / "shapes-noisy-reward"
    folders = {"plain": aware, "noise-aware": aware, "clean-trained": clean_trained(policy, args.work)}
    prompts = read_prompts("prompts:shapes-validation")[: args.prompts]
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"results-{args.prompts}x{args.samples}.json"
    table = json.loads(file.read_text()) if file.exists() else {}
    for heads, share, scale in plan(args.scales, args.front):
        name = key(heads, share, scale)
        if name not in table:
            how = Late if heads.endswith(LATE) else NRG, folders[heads.removesuffix(LATE)]
            table[name], seconds = sample(policy, prompts, *how, share, scale, args.samples)
            file.write_text(json.dumps(table))
            print(f"{name}: {seconds:.0f} s", flush=True)
    if "pushes" not in table:
        heads = {name: folders[name] for name in ("noise-aware", "clean-trained")}
        table["pushes"] = pushes(policy, prompts, heads)
        file.write_text(json.dumps(table))
    rows = {name: np.array(table[name]) for name in (key(*row) for row in plan(args.scales, args.front))}
    print(f"{args.prompts} prompts x {args.samples}, {STEPS} steps, guidance 1, torch {torch.__version__}")
    print_tables(rows, args.scales, args.samples)
    for heads, found in table["pushes"].items():
        for k, name in enumerate(noisy.OBJECTIVES):
            print(f"{heads}, {name} alone moves the latent at w 1, by step:", *(f"{row[k]:.3f}" for row in found))
    draw(rows, args.scales, args.front, args.out / "front.png")


if __name__ == "__main__":
    main()
