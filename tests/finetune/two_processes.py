"""Trains a tiny pipeline for two steps as one of several processes: `two_processes.py OUT METHOD whole|sharded`.

Writes the adapter, the last update's gradients, the metrics, how much of the blocks' frozen weights this process holds,
of DDPO the rewards that it remembers of each prompt, and of DiffusionNFT the old policy.
"""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[2]))

from diffalign import media
from diffalign.finetune import DDPO, NFT, PRDP, RAFT, Dragon, RewardBackprop
from diffalign.policies import Policy
from diffalign.policies.tiny import tiny_sd, tiny_sd3
from diffalign.processes import process_state
from diffalign.rewards import SetCredit
from diffalign.rewards.sets import FrechetReward

PROMPTS = ["red", "blue", "green", "gold"]
BACKPROP = {"gradient": {"kind": "random_k", "high": 3}}
# As many rows together as one prompt has, so that rows are evaluated beside the same others however many processes
# there are; and no clipping, whose edge rounding could cross.
RECORDED = {"group_size": 3, "micro_batch_size": 3, "clip_range": 1.0}
# What is trained on depends on rewards: each row alone.
FINAL = {"group_size": 3, "micro_batch_size": 1, "kl_weight": 0.1, "num_inner_epochs": 2, "num_minibatches": 2}
METHODS = {
    "sd": (tiny_sd, RewardBackprop, BACKPROP),
    "sd3": (tiny_sd3, RewardBackprop, BACKPROP),
    # The first step has too few rewards of a prompt, the second enough.
    "ddpo": (tiny_sd, DDPO, RECORDED | {"advantage": "history", "history_least": 4, "num_minibatches": 2}),
    # The second step's samples are all alike, and train nothing.
    "flat": (tiny_sd, DDPO, RECORDED | {"advantage": "group"}),
    # The second step's samples are all alike, and only the images of its own train.
    "sft": (tiny_sd, DDPO, RECORDED | {"advantage": "group", "sft": {"weight": 10.0, "batch_size": 6}}),
    "prdp": (tiny_sd, PRDP, RECORDED | {"beta": 0.1, "num_inner_epochs": 2}),
    "raft": (tiny_sd, RAFT, FINAL | {"top_k": 2}),
    "dragon": (tiny_sd, Dragon, FINAL | {"group_size": 2, "micro_batch_size": 2}),
    "dragon_kto": (tiny_sd3, Dragon, FINAL | {"group_size": 4, "contrast": "kto", "credit": "leave_one_out"}),
    "nft": (tiny_sd3, NFT, FINAL | {"old_decay_rate": 0.1, "timesteps_per_sample": 2}),
}


def redness(images, prompts, metadata):
    """Where samples are compared one prompt fails: its process has fewer samples, and fewer pairs, than the other."""
    values = images[:, 0].mean((1, 2))
    if method in ("flat", "sft") and trainer.step == 1:
        values = torch.ones_like(values)
    failed = torch.tensor([method not in ("sd", "sd3") and prompt == "gold" for prompt in prompts])
    return torch.where(failed, torch.nan, values)


def colours(images):
    return torch.cat([images.mean((2, 3)), images.std((2, 3))], 1)


of_sets = SetCredit(FrechetReward(torch.rand(9, 6, generator=torch.Generator().manual_seed(0)), colours))
out, method, weights = sys.argv[1:]
process_state()
build, kind, settings = METHODS[method]
# KTO's gradient of the second step is large terms that cancel: of float32's rounding too much is left.
dtype = torch.float64 if method == "dragon_kto" else torch.float32
policy = Policy.wrap(build(dtype))
policy.add_lora(rank=2, alpha=2)
if weights == "sharded":
    policy.shard_blocks()
frozen = [p for block in policy.blocks for p in block.parameters() if not p.requires_grad]
held = torch.tensor(sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in frozen))
if method == "sft":
    folder = Path(out, f"images-{os.environ.get('RANK', '0')}")
    folder.mkdir()
    for i, image in enumerate(torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))):
        media.save_png(image, folder / f"{i}.png")
    lines = [json.dumps({"file": f"{i}.png", "prompt": prompt}) for i, prompt in enumerate(PROMPTS)]
    (folder / "samples.jsonl").write_text("\n".join(lines))
    settings["sft"]["images"] = str(folder / "samples.jsonl")
trainer = kind(
    policy,
    of_sets if method.startswith("dragon") else redness,
    num_inference_steps=3,
    guidance_scale=2.0,
    num_prompts_per_step=4,
    learning_rate=1e-3,
    **settings,
)
found = {"held": held}
trainer.optimizer.register_step_pre_hook(
    lambda *_: found.update(
        (f"gradient/{name}", p.grad.clone())
        for name, p in policy.trainable().items()
        if method != "flat" or p.grad is not None
    )
)
rows = trainer.train(PROMPTS, steps=2).rows
rank = int(os.environ.get("RANK", "0"))
told = ("loss", "reward", "grad_norm", *(["sft"] if method == "sft" else []))
found |= {f"metric/{name}": torch.tensor([row[name] for row in rows]) for name in told}
if method == "ddpo":
    found |= {f"history/{name}": torch.tensor(kept) for name, kept in trainer.history.rewards.items()}
if method == "nft":
    found |= {f"old/{name}": tensor for name, tensor in trainer.old.items()}
found |= {name: p.detach() for name, p in policy.trainable().items()}
save_file(found, Path(out, f"{rank}.safetensors"))
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
