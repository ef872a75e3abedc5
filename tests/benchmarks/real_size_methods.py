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
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # a script finds only what lies beside it

import torch  # noqa: E402

from diffalign import media  # noqa: E402
from diffalign.data import Prompt  # noqa: E402
from diffalign.engine.machine import GIB, device_name  # noqa: E402
from diffalign.finetune import FlowDPO, FlowGRPO  # noqa: E402
from diffalign.policies import Policy  # noqa: E402
from tests.benchmarks.real_models import REAL, TINY, build  # noqa: E402
from tests.benchmarks.real_size import RANK, flops, in_a_process, matrix_rate, measured, reason, variance  # noqa: E402

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
    _, height, width = policy.latent_shape()
    side = 8 * height if height == width else 1024
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
    forward, both, decoding, _ = flops(model)
    if cell["method"] == "flow_grpo":
        return cell["steps"] * (forward + both) + decoding
    rows = Policy.wrap(build(model, "meta")).evaluations_per_prediction(model.guidance_scale)
    return (forward + both) / rows


def measure(cell):
    """What a cell's own process found out: figures, or why there are none."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = (TINY if cell["tiny"] else REAL)[cell["model"]]
    about = {"device": device_name(device), "matrix_rate": matrix_rate(device)}
    torch.manual_seed(0)
    try:
        policy = Policy.wrap(build(model, device))
        policy.place(device, offload_blocks=model.offload)
        policy.add_lora(rank=RANK, alpha=RANK)
        shared = {
            "gradient_checkpointing": "block",
            "learning_rate": 1e-6,
            "micro_batch_size": cell["micro_batch_size"],
        }
        with tempfile.TemporaryDirectory() as folder:
            step = METHODS[cell["method"]](policy, model, cell, shared, Path(folder))
            found = measured(step, cell["samples"], device)
    except Exception as error:  # a cell may fail in any way, and the others are measured all the same
        return about | {"failed": reason(error)}
    return about | found | {"flops_per_sample": flops_per_sample(model, cell)}


def table(cells):
    """The results as Markdown."""
    columns = "| model | method | samples | at once | samples/s | peak, GiB | TFLOP / sample | of the matrix rate |"
    lines = [columns, "|---" * 8 + "|"]
    for cell in cells:
        row = [cell["model"], cell["method"], str(cell["samples"]), str(cell["micro_batch_size"])]
        if "failed" in cell:
            row += [cell["failed"].replace("|", "/"), "", "", ""]
        else:
            share = cell["images_per_s"] * cell["flops_per_sample"] / cell["matrix_rate"]
            row += [f"{cell['images_per_s']:.3g}", f"{(cell['peak_bytes'] or 0) / GIB:.2f}"]
            row += [f"{cell['flops_per_sample'] / 1e12:.3g}", f"{100 * share:.1f} %"]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--samples", nargs="+", type=int, default=[8], help="in a step, an even number; tried in turn")
    parser.add_argument("--micro-batch-size", type=int, default=4, help="samples, or pairs, evaluated at once")
    parser.add_argument("--steps", type=int, help="denoising steps of Flow-GRPO; default 10, with --tiny 3")
    parser.add_argument("--out", type=Path, default=Path("runs/real_size_methods"))
    parser.add_argument("--tiny", action="store_true", help="small models of the same classes")
    parser.add_argument("--cell", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        args.out.write_text(json.dumps(measure(args.cell)))
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    args.out.mkdir(parents=True, exist_ok=True)
    shared = {"micro_batch_size": args.micro_batch_size, "steps": args.steps or (3 if args.tiny else 10)}
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
