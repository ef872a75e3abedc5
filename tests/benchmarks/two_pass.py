"""Peak memory and time of the gradient of a whole trajectory: two passes beside the full graph.

    python tests/benchmarks/two_pass.py [--pipeline zoo:shapes-sd3] [--steps 5 10 20 50] [--batch 4] [--full-up-to 20]

The bound by arithmetic, in denoiser forwards a density: the full graph takes 1 and 2 for its backward pass, two passes
take 1 more, so 4 / 3 of its time; in memory, one micro-batch of one step instead of all steps. Linux.
"""

import argparse
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor

import torch

import diffalign as da
from diffalign.engine.footprint import peak
from diffalign.laws import FlowSDE
from diffalign.laws.default import default_law
from diffalign.rollout import log_probs, rollout, trajectory_gradient

PROMPTS = ["a red circle", "a blue star left of a green square", "a small yellow star", "an orange square"]


def loss(matrix):
    """A square that couples every step of every trajectory."""
    total = matrix.sum(1)
    return (total[:, None] - total - 1).square().mean()


def measure(way, pipeline, steps, batch):
    """(seconds, bytes on top of what was in use, gradient) of a process of its own: freed memory stays with it."""
    torch.set_num_threads(1)
    policy = da.Policy.from_pretrained(pipeline)
    policy.add_lora(rank=8, alpha=8)
    condition = policy.encode([PROMPTS[i % len(PROMPTS)] for i in range(batch)])
    schedule = policy.schedule(steps)
    law = FlowSDE() if schedule.kind == "flow" else default_law(schedule.kind, 1.0)
    rows = [(i,) for i in range(batch)]
    taken = rollout(policy, condition, law, schedule, rows=rows, seed=0, guidance_scale=3.0, record_states=True)
    chain, settings = (policy, taken, condition, law, schedule), {"guidance_scale": 3.0, "reduction": "mean"}

    def work():
        if way == "two passes":
            trajectory_gradient(*chain, loss, micro_batch_size=batch, **settings)
        else:
            loss(log_probs(*chain, **settings)).backward()

    before, start = peak(policy.device, lambda: None), time.perf_counter()
    during, seconds = peak(policy.device, work), time.perf_counter() - start
    return seconds, during - before, torch.cat([p.grad.flatten() for p in policy.trainable().values()]).numpy()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="zoo:shapes-sd3")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20, 50])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--full-up-to", type=int, default=20, help="the full graph of more steps is not tried")
    args = parser.parse_args()
    print(f"{args.pipeline}, {args.batch} trajectories, guidance 3, no checkpointing, torch {torch.__version__}")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as alone:
        for steps in args.steps:
            two = alone.submit(measure, "two passes", args.pipeline, steps, args.batch).result()
            line = f"{steps:3d} steps: two passes {two[1] / 2**20:5.0f} MiB, {two[0]:6.1f} s"
            if steps <= args.full_up_to:
                full = alone.submit(measure, "full graph", args.pipeline, steps, args.batch).result()
                away = abs(two[2] - full[2]).max() / abs(full[2]).max()
                line += (
                    f"; full graph {full[1] / 2**20:5.0f} MiB, {full[0]:6.1f} s; memory {two[1] / full[1]:.2f}, time "
                    f"{two[0] / full[0]:.2f} (bound 1.33); largest difference {away:.1e} of the largest entry, fp32"
                )
            print(line, flush=True)


if __name__ == "__main__":
    main()
