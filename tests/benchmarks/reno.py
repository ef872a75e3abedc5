"""ReNO per iteration: several prompts in a batch and prompts encoded once, beside the straightforward recipe.

    python tests/benchmarks/reno.py [--pipeline zoo:shapes-sd] [--rewards shapes-clip shapes-preference] [--prompts 8]
                                    [--iterations 6] [--real sd15 sdxl sd35m] [--tiny]

The straightforward recipe takes one prompt at a time and runs the text towers of pipeline and rewards in every
iteration. Both take one step without guidance, on the same noise, and reach the same latents up to rounding. What is
saved by arithmetic is those towers: the bound is the ratio of the FLOPs of an iteration, counted by torch. What a batch
saves beyond that, by filling the machine, is measured. A sample of best-of-n says how many of them an iteration costs.

`--real` takes random weights of the real classes in bfloat16 (`--tiny`: small ones), whose text encoders are not of the
real size, and a reward that costs nothing: the figures are of denoiser and decoder, at batch 1 and at `--prompts`, for
each way of checkpointing, with the peak memory, weights included. Each row is a process of its own.
"""

import argparse
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # a script finds only what lies beside it

import torch  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import diffalign as da  # noqa: E402
from diffalign.engine.footprint import peak  # noqa: E402
from diffalign.search.best_of_n import BestOfN  # noqa: E402
from diffalign.search.budget import Budget  # noqa: E402
from diffalign.search.config import ChainConfig  # noqa: E402
from diffalign.search.policy_space import PolicySpace  # noqa: E402
from diffalign.search.reno import ReNO  # noqa: E402
from tests.benchmarks.real_models import REAL, TINY, build  # noqa: E402
from tests.benchmarks.real_size import seconds, variance  # noqa: E402

PROMPTS = ["a red circle", "a blue star left of a green square", "a small yellow star", "an orange square"]
CHAIN = ChainConfig(num_inference_steps=1, guidance_scale=1.0, eta=0.0)


class Straightforward(PolicySpace):
    """Prompts are encoded anew for every evaluation and every score."""

    def evaluate(self, rows):
        self.policy.forget_prompts()
        self.condition = self.policy.encode([p.text for p in self.prompts])
        return super().evaluate(rows)

    def rate(self, results, prompts):
        for reward in self.reward.walk():
            if hasattr(reward, "encoder"):
                reward.encoder._text.clear()
        return super().rate(results, prompts)


def prompts_of(count):
    """Prompts that all differ, so that none is encoded for another."""
    return [f"{PROMPTS[i % len(PROMPTS)]} {i}" for i in range(count)]


def run(search, space, iterations):
    """The results of some iterations."""
    return search.run(space, Budget(reward_calls=iterations))


def rewarded(names):
    total = da.rewards.load(names[0])
    for name in names[1:]:
        total = total + da.rewards.load(name)
    return total


def timed(work, device):
    """The shorter of two times, after one run to warm up."""
    work()
    return min(seconds(work, device) for _ in range(2))


def zoo(args):
    policy, reward = da.Policy.from_pretrained(args.pipeline), rewarded(args.rewards)
    prompts, search = prompts_of(args.prompts), ReNO(gradient_checkpointing="none")
    batch = PolicySpace(policy, reward, prompts, CHAIN)
    alone = [Straightforward(policy, reward, [da.data.Prompt(p, i)], CHAIN) for i, p in enumerate(prompts)]
    images = args.prompts * args.iterations
    ours = timed(lambda: run(search, batch, args.iterations), policy.device) / images
    plain = timed(lambda: [run(search, each, args.iterations) for each in alone], policy.device) / images
    sample = timed(lambda: run(BestOfN(), batch, args.iterations), policy.device) / images
    together = run(search, batch, 2)
    apart = [run(search, each, 2)[0] for each in alone]
    away = max(float((a.results - b.results).abs().max()) for a, b in zip(together, apart, strict=True))
    print(f"{args.pipeline}, {args.prompts} prompts, {' + '.join(args.rewards)}, torch {torch.__version__}")
    print(f"an iteration of one image: {ours:.4f} s; straightforward {plain:.4f} s, {plain / ours:.2f} times as long")
    print(f"bound from the text towers alone {flops(search, alone) / flops(search, [batch]):.2f}, by FLOPs")
    print(f"a sample of best-of-n {sample:.4f} s: an iteration costs {ours / sample:.2f}; results differ by {away:.1e}")


def flops(search, spaces):
    """FLOPs of an iteration with its backward pass: two iterations less one, which has none."""
    counts = []
    for iterations in (1, 2):
        with FlopCounterMode(display=False) as counter:
            for space in spaces:
                run(search, space, iterations)
        counts.append(counter.get_total_flops())
    return counts[1] - counts[0]


def real(name, tiny, batch, checkpointing, iterations):
    """(seconds of an iteration of one image, peak bytes), or why there are none."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy = da.Policy.wrap(build((TINY if tiny else REAL)[name], device))
    policy.place(device)
    space = PolicySpace(policy, variance, prompts_of(batch), CHAIN)
    search, taken = ReNO(gradient_checkpointing=checkpointing), []
    try:
        most = peak(device, lambda: taken.append(timed(lambda: run(search, space, iterations), device)))
    except torch.OutOfMemoryError:
        return "out of memory"
    return f"{taken[0] / batch / iterations:8.4f} s an image and iteration, peak {(most or 0) / 2**30:6.2f} GiB"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="zoo:shapes-sd")
    parser.add_argument("--rewards", nargs="+", default=["shapes-clip", "shapes-preference"])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=6)
    parser.add_argument("--real", nargs="*", default=[], choices=["sd15", "sdxl", "sd35m"])
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if not args.real:
        zoo(args)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as own:
        for name in args.real:
            for batch in (1, args.prompts):
                for how in ("none", "step", "block"):
                    start = time.perf_counter()
                    figures = own.submit(real, name, args.tiny, batch, how, args.iterations).result()
                    print(f"{name:6s} batch {batch:2d} {how:5s}: {figures} ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
