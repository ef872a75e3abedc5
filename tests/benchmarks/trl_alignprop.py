"""One AlignProp step beside that of trl 0.23.1, the last release that has it: gradients, images/s and peak memory.

    python tests/benchmarks/trl_alignprop.py [--pipeline assets/zoo/shapes-sd] [--batch 8] [--steps 20] [--k 3]

trl is installed without its dependencies into a folder of its own (`--trl`, default .benchmarks/trl) and imported
only by its own process. Both sides get the same weights, LoRA, prompts, starting noise, truncation and reward.
Gradients are compared on a tiny random pipeline, no pixel of which is saturated: at saturated pixels trl's clamp
stops the gradient and ours does not.

The bound by arithmetic, in denoiser forwards an image: a step without gradient costs 1; one with gradient 1, again 1
if it is checkpointed, and 2 for its backward pass. Both sides take N - K steps of the first kind and K of the second,
so the ratio that can be had is 1 with the same checkpointing, and (N + 3K) / (N + 2K) for ours without it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[2]
REPEATS = 3
TRL = ["trl==0.23.1", "pandas", "python-dateutil", "six"]
PROMPTS = [
    "a red circle",
    "a blue star left of a green square",
    "an orange square above a purple circle",
    "a small yellow star",
]


def peak_memory(reset=False):
    """VmHWM of this process in bytes; `reset` sets it to what is in use now (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def set_lora(parameters):
    """The same LoRA on both sides, off its identity start, where half of its gradient vanishes."""
    from diffalign.noise import normal

    for name, p in parameters.items():
        p.data.copy_(0.05 * normal(p.shape, seed=0, purpose="benchmark", rows=[(name,)])[0])


def starting_noise(shape):
    from diffalign.noise import normal

    return normal(shape[1:], seed=0, purpose="initial", rows=[(i, 0, 0) for i in range(shape[0])])


def reward(images, prompts, metadata):
    """Smooth, of every pixel, different for every image."""
    import torch

    ramp = torch.linspace(0.5, 1.5, images.shape[-1])
    return ((images * ramp).mean((2, 3)) * torch.tensor([1.0, -0.5, 0.3])).sum(1) + images.var((1, 2, 3))


def measured(step, batch):
    """Seconds of the fastest of some steps after one to warm up, and the memory that a step takes on top."""
    step()
    before = peak_memory(reset=True)
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return {"images_per_s": batch / min(seconds), "peak_bytes": peak_memory() - before}


def ours(args):
    import torch

    from diffalign._compat import ensure_torchvision

    ensure_torchvision()
    from diffusers import StableDiffusionPipeline

    from diffalign.data import Prompt
    from diffalign.finetune import RewardBackprop
    from diffalign.policies import Policy

    torch.manual_seed(0)
    policy = Policy.wrap(StableDiffusionPipeline.from_pretrained(args.pipeline))
    policy.add_lora(rank=4, alpha=4, target_modules=["to_k", "to_q", "to_v", "to_out.0"])
    trainer = RewardBackprop(
        policy, reward, num_inference_steps=args.steps, guidance_scale=5.0, gradient={"kind": "last_k", "k": args.k},
        num_prompts_per_step=args.batch, gradient_checkpointing=args.checkpointing, learning_rate=1e-12,
        adam_weight_decay=0,
    )  # fmt: skip
    set_lora(policy.trainable())
    prompts = [Prompt(PROMPTS[i % len(PROMPTS)], i, {}) for i in range(args.batch)]

    def step():
        trainer.optimizer.zero_grad()
        trainer.step = 0  # the address of the noise
        trainer.take_step(prompts)

    trainer.training = trainer.training.model_copy(update={"max_grad_norm": 1e30})
    trainer.take_step(prompts)
    gradient = {name: p.grad.clone() for name, p in policy.trainable().items()}
    return gradient, measured(step, args.batch) if args.time else {}


def trl_trainer(folder, path, reward, *, batch, steps, k, guidance_scale, rank, mixed_precision, cpu):
    """trl's trainer, from the folder that trl lies in, of the pipeline at a path; its class writes down rank 4."""
    sys.path.insert(0, folder)
    warnings.simplefilter("ignore")
    from accelerate import PartialState

    PartialState(cpu=cpu)  # trl logs while it loads, which asks for it
    from trl import AlignPropConfig, AlignPropTrainer, DefaultDDPOStableDiffusionPipeline
    from trl.models import modeling_sd_base

    lora = modeling_sd_base.LoraConfig
    modeling_sd_base.LoraConfig = lambda **settings: lora(**settings | {"r": rank, "lora_alpha": rank})
    pipeline = DefaultDDPOStableDiffusionPipeline(path, use_lora=True)
    numbers = iter(range(10**9))
    config = AlignPropConfig(
        sample_num_steps=steps, sample_guidance_scale=guidance_scale, sample_eta=0.0, train_batch_size=batch,
        train_gradient_accumulation_steps=1, truncated_backprop_rand=False, truncated_backprop_timestep=steps - k,
        mixed_precision=mixed_precision, train_learning_rate=1e-12, train_adam_weight_decay=0.0,
        train_max_grad_norm=1e30, seed=0,
    )  # fmt: skip
    config.accelerator_kwargs = {"cpu": cpu}
    trainer = AlignPropTrainer(
        config, lambda images, prompts, metadata: (reward(images, prompts, metadata), {}),
        lambda: (PROMPTS[next(numbers) % batch % len(PROMPTS)], {}), pipeline,
    )  # fmt: skip
    pipeline.sd_pipeline.set_progress_bar_config(disable=True)
    return trainer, pipeline


def trl(args):
    import torch

    from diffalign._compat import ensure_torchvision

    ensure_torchvision()
    torch.manual_seed(0)
    trainer, pipeline = trl_trainer(
        args.trl, args.pipeline, reward, batch=args.batch, steps=args.steps, k=args.k, guidance_scale=5.0, rank=4,
        mixed_precision="no", cpu=True,
    )  # fmt: skip
    parameters = {n: p for n, p in pipeline.sd_pipeline.unet.named_parameters() if p.requires_grad}
    set_lora(parameters)
    make = pipeline.sd_pipeline.prepare_latents
    pipeline.sd_pipeline.prepare_latents = lambda *a, **k: starting_noise(make(*a, **k).shape)

    gradient = {}
    update = trainer.optimizer.step

    def keep_and_update(*a, **k):
        gradient.update({name: p.grad.clone() for name, p in parameters.items()})
        return update(*a, **k)

    trainer.optimizer.step = keep_and_update
    trainer.step(0, 0)
    return dict(gradient), measured(lambda: trainer.step(0, 0), args.batch) if args.time else {}


def install(folder):
    """trl without its dependencies in a folder of its own, unless it is there."""
    if not Path(folder, "trl").is_dir():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, *TRL]
        subprocess.run(command, check=True)


def side(name, args, **changes):
    """Runs one side in a process of its own; (gradient, measurements)."""
    from safetensors.torch import load_file

    settings = vars(args) | {"side": name} | changes
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"--{k}={v}" for k, v in settings.items() if k not in ("time", "out")]
        flags += [f"--out={folder}"] + (["--time"] if settings["time"] else [])
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
        return load_file(Path(folder, "gradient.safetensors")), json.loads(Path(folder, "measured.json").read_text())


def distance(a, b):
    """||a - b|| / ||b|| over all tensors."""
    import torch

    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())[:4]
    flat = [torch.cat([t[k].flatten().double() for k in sorted(t)]) for t in (a, b)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default=str(ROOT / "assets/zoo/shapes-sd"))
    parser.add_argument("--trl", default=str(ROOT / ".benchmarks/trl"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--k", type=int, default=3)
    parser.add_argument("--checkpointing", default="step")
    parser.add_argument("--side", choices=["ours", "trl"])
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--out")
    args = parser.parse_args()
    if args.side:
        from safetensors.torch import save_file

        gradient, result = {"ours": ours, "trl": trl}[args.side](args)
        save_file({k: v.contiguous() for k, v in gradient.items()}, Path(args.out, "gradient.safetensors"))
        Path(args.out, "measured.json").write_text(json.dumps(result))
        return 0
    install(args.trl)
    return compare(args)


def compare(args):
    sys.path.insert(0, str(ROOT))
    from diffalign.policies.tiny import tiny_sd

    with tempfile.TemporaryDirectory() as folder:
        pipe = tiny_sd()
        pipe.vae.decoder.conv_out.weight.data *= 0.1  # far from saturation
        pipe.save_pretrained(folder)
        tiny = {"pipeline": folder, "batch": 4, "steps": 6}
        apart = {k: distance(side("ours", args, k=k, **tiny)[0], side("trl", args, k=k, **tiny)[0]) for k in (1, 3, 6)}
    for k, relative in apart.items():
        print(f"gradient, tiny random SD, 6 steps, last {k}: relative difference {relative:.2e}")
    n, k = args.steps, args.k
    theirs = side("trl", args, time=True)[1]
    for checkpointing, bound in (("step", 1.0), ("none", (n + 3 * k) / (n + 2 * k))):
        mine = side("ours", args, time=True, checkpointing=checkpointing)[1]
        print(
            f"{Path(args.pipeline).name}, batch {args.batch}, {n} steps, last {k}, checkpointing {checkpointing}: "
            f"images/s {mine['images_per_s']:.2f} / {theirs['images_per_s']:.2f} = "
            f"{mine['images_per_s'] / theirs['images_per_s']:.2f} (bound {bound:.2f}); peak memory of a step "
            f"{mine['peak_bytes'] / 2**20:.0f} / {theirs['peak_bytes'] / 2**20:.0f} MiB = "
            f"{mine['peak_bytes'] / theirs['peak_bytes']:.2f}"
        )
    return 0 if max(apart.values()) < 1e-4 else 1


if __name__ == "__main__":
    raise SystemExit(main())
