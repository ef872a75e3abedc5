"""Reward backpropagation at real size with random weights of the real classes: speed, memory, share of the peak rate.

    python tests/benchmarks/real_size.py [--models sd15 sdxl sd35m flux1] [--attention auto flash ...] [--batch 4 ...]
                                         [--steps 10] [--k 1] [--out runs/real_size] [--tiny]

A training step of `RewardBackprop` on Stable Diffusion 1.5 at 512 pixels, and on SDXL, SD3.5 medium and FLUX.1-dev at
1024: base in bfloat16, LoRA of rank 16 in fp32, guidance of each pipeline's documentation, last k steps with gradient.
The blocks of FLUX.1 wait in main memory (`offload_blocks`). Each row is a process of its own. `--tiny` goes the same
way with small models, on a CPU too. For Stable Diffusion 1.5 a row of trl 0.23.1 follows, on the same weights and
settings; it computes whole UNet calls again and keeps the decoder's activations.

The reward is the variance of all pixels of an image: every pixel has a gradient, and it costs nothing beside the rest.

FLOPs are of one image's share of a step, without what checkpointing computes again: one evaluation, one evaluation with
its backward pass and one decoding with its own are counted by torch on the meta device, and taken N - k, k and 1 times.
The share of the matrix rate is these FLOPs in a second, by what a large bfloat16 product reached in the same process.
Images/s are those of the fastest of three steps; the peak is all that torch holds on the GPU, weights included. On a
CPU it is all that the process holds, and the product is a small one, by which the share means little.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # a script finds only what lies beside it

import torch  # noqa: E402

from diffalign.data import Prompt  # noqa: E402
from diffalign.engine.footprint import peak  # noqa: E402
from diffalign.engine.machine import GIB, Kernels, device_name  # noqa: E402
from diffalign.finetune import RewardBackprop  # noqa: E402
from diffalign.policies import Condition, Policy  # noqa: E402
from diffalign.policies.attention import KERNELS  # noqa: E402
from diffalign.versions import versions  # noqa: E402
from tests.benchmarks.real_models import REAL, TINY, build  # noqa: E402
from tests.benchmarks.trl_alignprop import PROMPTS, install, trl_trainer  # noqa: E402

ATTENTION = ("auto", *KERNELS, "xformers")
CHECKPOINTING = ("block", "none")
RANK = 16
REPEATS = 3


def variance(images, prompts, metadata):
    """The reward."""
    return images.float().flatten(1).var(1)


def parameters(model):
    """Number of weights of the denoiser."""
    denoiser = getattr(build(model, "meta"), model.denoiser[0])
    return sum(p.numel() for p in denoiser.parameters())


def flops_per_image(model, steps, k):
    """Floating-point operations of a training step for each image, nothing computed twice; see the top."""
    forward, both, _, decoding = flops(model)
    return (steps - k) * forward + k * both + decoding


def flops(model):
    """FLOPs of an image's evaluation, of one with its backward pass, of a decoding, of one with its backward pass."""
    policy = Policy.wrap(build(model, "meta"))
    policy.add_lora(rank=RANK, alpha=RANK)
    rows = policy.evaluations_per_prediction(model.guidance_scale)
    condition = policy.embed_guidance(encoded(model, rows), model.guidance_scale)
    x, timestep = torch.empty(rows, *policy.latent_shape(), device="meta"), torch.empty(rows, device="meta")
    latents = x[:1].clone().requires_grad_()
    return *counted(lambda: policy.evaluate(x, timestep, condition)), *counted(lambda: policy.decode(latents))


def encoded(model, rows):
    """Prompts as the policy has them encoded, on the meta device."""
    config = model.denoiser[2]
    width = config.get("cross_attention_dim") or config["joint_attention_dim"]
    shapes = {"prompt_embeds": (rows, model.tokens, width)}
    if model.pooled:
        shapes["pooled_prompt_embeds"] = (rows, model.pooled)
    return Condition({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})


def counted(work):
    """FLOPs of some work, and with its backward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        result = work()
        forward = counter.get_total_flops()
        result.sum().backward()
    return forward, counter.get_total_flops()


def matrix_rate(device):
    """FLOPs a second of a large bfloat16 product, the best of some."""
    size, times = (8192, 20) if device.type == "cuda" else (256, 2)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))

    def products():
        for _ in range(times):
            a @ b

    return times * 2 * size**3 / min(seconds(products, device) for _ in range(4))


def seconds(work, device):
    """Seconds until the device has done some work."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measured(step, batch, device):
    """Images/s of the fastest of some steps after one to warm up, and the peak memory of all but that."""
    seconds(step, device)
    taken = []
    most = peak(device, lambda: taken.extend(seconds(step, device) for _ in range(REPEATS)))
    return {"images_per_s": batch / min(taken), "peak_bytes": most}


def adapted(model, device, attention="auto"):
    """The model's policy with a LoRA, where it is to be."""
    policy = Policy.wrap(build(model, device))
    policy.place(device, offload_blocks=model.offload)
    policy.set_attention(attention)
    policy.add_lora(rank=RANK, alpha=RANK)
    return policy


def ours(model, cell, device):
    policy = adapted(model, device, cell["attention"])
    trainer = RewardBackprop(
        policy,
        variance,
        num_inference_steps=cell["steps"],
        guidance_scale=model.guidance_scale,
        gradient={"kind": "last_k", "k": cell["k"]},
        num_prompts_per_step=cell["batch"],
        gradient_checkpointing=cell["checkpointing"],
        learning_rate=1e-6,
    )
    prompts = [Prompt(PROMPTS[i % len(PROMPTS)], i, {}) for i in range(cell["batch"])]
    ran = kernels(policy, model)
    return {"kernels": ran} | measured(lambda: trainer.take_step(prompts), cell["batch"], device)


def kernels(policy, model):
    """The attention kernels that an evaluation of the denoiser runs."""
    level = policy.schedule(2).level(0, policy.device).expand(1)
    x = torch.zeros(1, *policy.latent_shape(), device=policy.device)
    with torch.no_grad(), Kernels() as seen:
        policy.predict(x, level, policy.encode(PROMPTS[:1]), model.guidance_scale)
    return ", ".join(seen.ran) or "plain matrix products"


def trl(model, cell, device):
    with tempfile.TemporaryDirectory() as folder:
        build(model, "cpu").save_pretrained(folder)
        trainer, _ = trl_trainer(
            cell["trl"],
            folder,
            variance,
            batch=cell["batch"],
            steps=cell["steps"],
            k=cell["k"],
            guidance_scale=model.guidance_scale,
            rank=RANK,
            mixed_precision="bf16",
            cpu=device.type == "cpu",
        )
    return measured(lambda: trainer.step(0, 0), cell["batch"], device)


def measure(cell):
    """Figures of a cell; see `found`."""
    return found(cell, trl if cell["checkpointing"] == "trl" else ours)


def found(cell, work):
    """What a cell's own process found out by work(model, cell, device): figures, or why there are none."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = (TINY if cell["tiny"] else REAL)[cell["model"]]
    about = {"device": device_name(device), "matrix_rate": matrix_rate(device)}
    torch.manual_seed(0)
    try:
        return about | work(model, cell, device)
    except Exception as error:  # a cell may fail in any way, and the others are measured all the same
        return about | {"failed": reason(error)}


def reason(error):
    """Why a cell failed, in a few words."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "out of memory"
    said = (str(error).strip().splitlines() or [""])[0]
    return (said if isinstance(error, ValueError) else f"{type(error).__name__}: {said}")[:200]


def in_a_process(cell, script=__file__):
    """The cell with what its own process found; memory of the last one cannot be in the way."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "cell.json")
        command = [sys.executable, script, "--cell", json.dumps(cell), "--out", str(file)]
        done = subprocess.run(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        if file.exists():
            return cell | json.loads(file.read_text())
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return cell | {"failed": f"killed by {name}" + ("; out of main memory?" if name == "SIGKILL" else "")}
    return cell | {"failed": (done.stderr.strip().splitlines() or ["it ended without a word"])[-1][:160]}


def plan(args):
    """Every cell, each model's after one another."""
    shared = {"steps": args.steps, "k": args.k, "tiny": args.tiny, "trl": args.trl}
    for name in args.models:
        for batch in args.batch:
            cell = {"model": name, "batch": batch} | shared
            for attention in args.attention:
                for checkpointing in CHECKPOINTING:
                    yield cell | {"attention": attention, "checkpointing": checkpointing}
            if name == "sd15":
                yield cell | {"attention": "auto", "checkpointing": "trl"}


def table(results):
    """The results as Markdown."""
    lines = [
        "| model | weights, M | TFLOP / image | batch | attention | checkpointing | images/s | of trl's | peak, GiB | "
        "of the matrix rate |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    theirs = {
        (c["model"], c["batch"]): c["images_per_s"]
        for c in results["cells"]
        if c["checkpointing"] == "trl" and "failed" not in c
    }
    for cell in results["cells"]:
        model = results["models"][cell["model"]]
        attention = cell["attention"] + (f" ({cell['kernels']})" if "kernels" in cell else "")
        row = [cell["model"], f"{model['parameters'] / 1e6:,.1f}", f"{model['flops_per_image'] / 1e12:.3g}"]
        row += [
            str(cell["batch"]),
            attention,
            "trl 0.23.1" if cell["checkpointing"] == "trl" else cell["checkpointing"],
        ]
        if "failed" in cell:
            row += [cell["failed"].replace("|", "/"), "", "", ""]
        else:
            their = theirs.get((cell["model"], cell["batch"]))
            row += [f"{cell['images_per_s']:.3g}", f"{cell['images_per_s'] / their:.2f}" if their else ""]
            row += [f"{(cell['peak_bytes'] or 0) / GIB:.2f}", f"{share(cell, model['flops_per_image'])}"]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def share(cell, flops_per_image):
    """Of what a large product reached, the part that the step reached, as text."""
    return f"{100 * cell['images_per_s'] * flops_per_image / cell['matrix_rate']:.1f} %"


def run(args):
    args.out.mkdir(parents=True, exist_ok=True)
    # No word to the GPU from this process: a context of its own would take room there.
    results = {"system": platform.platform(), "versions": versions(), "models": {}, "cells": []}
    for name in args.models:
        model = (TINY if args.tiny else REAL)[name]
        count, flops = parameters(model), flops_per_image(model, args.steps, args.k)
        results["models"][name] = {"parameters": count, "flops_per_image": flops}
        print(f"{name}: {count / 1e6:,.1f} M weights, {flops / 1e12:.3g} TFLOP an image", flush=True)
    if "sd15" in args.models:
        install(args.trl)
    cells = list(plan(args))
    for number, cell in enumerate(cells):
        start = time.perf_counter()
        found = in_a_process(cell)
        results["cells"].append(found)
        said = (
            found.get("failed") or f"{found['images_per_s']:.3g} images/s, {(found['peak_bytes'] or 0) / GIB:.2f} GiB"
        )
        where = " ".join(str(cell[key]) for key in ("model", "batch", "attention", "checkpointing"))
        print(f"[{number + 1}/{len(cells)}] {where}: {said} ({time.perf_counter() - start:.0f} s)", flush=True)
        (args.out / "results.json").write_text(json.dumps(results, indent=1))
        (args.out / "results.md").write_text(heading(results) + table(results))
    print(f"\n{heading(results)}{table(results)}\nwritten to {args.out}")


def heading(results):
    """What the table's figures belong to."""
    cells = results["cells"]
    about = [
        f"{c['device']}, {c['matrix_rate'] / 1e12:.3g} TFLOP/s of bfloat16 products" for c in cells if "device" in c
    ]
    return (
        f"{about[0] if about else 'no row could be measured'}, torch {results['versions']['torch']}; "
        f"last {cells[0]['k']} of {cells[0]['steps']} steps, LoRA of rank {RANK}\n\n"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=REAL, default=list(REAL))
    parser.add_argument("--attention", nargs="+", choices=ATTENTION, help="default: all of them, with --tiny auto")
    parser.add_argument(
        "--batch", nargs="+", type=int, help="images in a step, tried in turn; default 4, with --tiny 2"
    )
    parser.add_argument("--steps", type=int, help="denoising steps; default 10, with --tiny 3")
    parser.add_argument("--k", type=int, default=1, help="of which the last k have a gradient")
    parser.add_argument("--out", type=Path, default=Path("runs/real_size"))
    parser.add_argument("--trl", default=str(ROOT / ".benchmarks/trl"))
    parser.add_argument("--tiny", action="store_true", help="small models of the same classes")
    parser.add_argument("--cell", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        args.out.write_text(json.dumps(measure(args.cell)))
        return
    args.attention = args.attention or (["auto"] if args.tiny else list(ATTENTION))
    args.batch = args.batch or [2 if args.tiny else 4]
    args.steps = args.steps or (3 if args.tiny else 10)
    os.environ["HF_HUB_OFFLINE"] = "1"
    run(args)


if __name__ == "__main__":
    main()
