"""Flow-GRPO and Flow-DPO at the size of SD3.5 medium and FLUX.1-dev, with random weights: samples/s and peak memory.

    python tests/benchmarks/real_size_methods.py [--models sd35m flux1] [--methods flow_grpo flow_dpo] [--samples 8 ...]
                                                 [--steps 10] [--out runs/real_size_methods] [--tiny]

A training step on images of 1024 pixels: base in bfloat16, LoRA of rank 16 in fp32, blocks computed again in the
backward pass, the guidance of the pipeline's documentation. Flow-GRPO draws and trains as many samples as it says, two
prompts' groups, in `--steps` steps all of which draw noise; Flow-DPO trains on half as many pairs, whose latents are
kept. A sample of either is an image. Each row is a process of its own; `--tiny` goes the same way on a CPU.

FLOPs are of a sample's share of a step, nothing computed twice: of Flow-GRPO one evaluation and one with its backward
pass for every step, and a decoding; of Flow-DPO one of each, without guidance. Their share of the matrix rate,
samples/s and the peak are as `real_size.py` says.
"""

import argparse
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # a script finds only what lies beside it

import torch  # noqa: E402

from diffalign import media  # noqa: E402
from diffalign.data import Prompt  # noqa: E402
from diffalign.engine.machine import GIB  # noqa: E402
from diffalign.finetune import FlowDPO, FlowGRPO  # noqa: E402
from tests.benchmarks.real_size import RANK, adapted, flops, found, in_a_process, measured, share, variance  # noqa: E402

MODELS = ("sd35m", "flux1")
TEXTS = ("a red circle above a blue square", "a small green star")


def flow_grpo(policy, model, cell, shared, _folder):
    """A step on two groups."""
    how = {"num_inference_steps": cell["steps"], "guidance_scale": model.guidance_scale}
    counts = {"num_prompts_per_step": 2, "group_size": cell["samples"] // 2}
    trainer = FlowGRPO(policy, variance, **how, **counts, **shared)
    prompts = [Prompt(text, i, {}) for i, text in enumerate(TEXTS)]
    return lambda: trainer.take_step(prompts)


def flow_dpo(policy, model, cell, shared, folder):
    """A step on pairs of noise."""
    side = policy.latent_shape()[1] * policy.pipe.vae_scale_factor
    count, lines = cell["samples"] // 2, []
    for i in range(count):
        files = {"chosen": f"{i}-chosen.png", "rejected": f"{i}-rejected.png"}
        for file in files.values():
            media.save_png(torch.rand(3, side, side), folder / file)
        lines.append(json.dumps({"prompt": TEXTS[i % 2]} | files))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    trainer = FlowDPO(policy, pairs=folder / "pairs.jsonl", num_prompts_per_step=count, **shared)
    return lambda: trainer.take_step(trainer.prompts)


METHODS = {"flow_grpo": flow_grpo, "flow_dpo": flow_dpo}


def flops_per_sample(model, cell):
    """See the top."""
    if cell["method"] == "flow_dpo":
        forward, both, *_ = flops(replace(model, guidance_scale=1.0))
        return forward + both
    forward, both, decoding, _ = flops(model)
    return cell["steps"] * (forward + both) + decoding


def train(model, cell, device):
    """Figures of a cell."""
    policy = adapted(model, device)
    shared = {"gradient_checkpointing": "block", "learning_rate": 1e-6, "micro_batch_size": cell["at_once"]}
    with tempfile.TemporaryDirectory() as folder:
        step = METHODS[cell["method"]](policy, model, cell, shared, Path(folder))
        return measured(step, cell["samples"], device) | {"flops_per_sample": flops_per_sample(model, cell)}


def table(cells):
    """The results as Markdown."""
    columns = "| model | method | samples | at once | samples/s | peak, GiB | TFLOP / sample | of the matrix rate |"
    lines = [columns, "|---" * 8 + "|"]
    for cell in cells:
        row = [cell["model"], cell["method"], str(cell["samples"]), str(cell["at_once"])]
        if "failed" in cell:
            row += [cell["failed"].replace("|", "/"), "", "", ""]
        else:
            row += [f"{cell['images_per_s']:.3g}", f"{(cell['peak_bytes'] or 0) / GIB:.2f}"]
            row += [f"{cell['flops_per_sample'] / 1e12:.3g}", share(cell, cell["flops_per_sample"])]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--samples", nargs="+", type=int, default=[8], help="in a step, an even number; tried in turn")
    parser.add_argument("--at-once", type=int, default=4, help="samples, or pairs, evaluated at once")
    parser.add_argument("--steps", type=int, help="denoising steps of Flow-GRPO; default 10, with --tiny 3")
    parser.add_argument("--out", type=Path, default=Path("runs/real_size_methods"))
    parser.add_argument("--tiny", action="store_true", help="small models of the same classes")
    parser.add_argument("--cell", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        args.out.write_text(json.dumps(found(args.cell, train)))
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    args.out.mkdir(parents=True, exist_ok=True)
    shared = {"at_once": args.at_once, "steps": args.steps or (3 if args.tiny else 10)}
    cells = []
    for model in args.models:
        for method in args.methods:
            for samples in args.samples:
                cell = {"model": model, "method": method, "samples": samples, "tiny": args.tiny} | shared
                cells.append(in_a_process(cell, __file__))
                (args.out / "results.json").write_text(json.dumps(cells, indent=1))
    print(f"{cells[0].get('device', '')}, torch {torch.__version__}, LoRA of rank {RANK}\n\n{table(cells)}")


if __name__ == "__main__":
    main()
