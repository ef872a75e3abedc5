"""Trains a tiny pipeline for two steps as one of several processes: `two_processes.py OUT METHOD whole|sharded`.

Writes the adapter, the last update's gradients, the metrics, how much of the blocks' frozen weights this process holds,
and of DDPO the rewards that it remembers of each prompt.
"""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[2]))

from diffalign.finetune import DDPO, PRDP, RewardBackprop
from diffalign.policies import Policy
from diffalign.policies.tiny import tiny_sd, tiny_sd3
from diffalign.processes import process_state

PROMPTS = ["red", "blue", "green", "gold"]
BACKPROP = {"gradient": {"kind": "random_k", "high": 3}}
# As many rows together as one prompt has, so that rows are evaluated beside the same others however many processes
# there are; and no clipping, whose edge rounding could cross.
RECORDED = {"group_size": 3, "micro_batch_size": 3, "clip_range": 1.0}
METHODS = {
    "sd": (tiny_sd, RewardBackprop, BACKPROP),
    "sd3": (tiny_sd3, RewardBackprop, BACKPROP),
    # The first step has too few rewards of a prompt, the second enough.
    "ddpo": (tiny_sd, DDPO, RECORDED | {"advantage": "history", "history_least": 4, "num_minibatches": 2}),
    "prdp": (tiny_sd, PRDP, RECORDED | {"beta": 0.1, "num_inner_epochs": 2}),
}


def redness(images, prompts, metadata):
    """Of recorded trajectories one prompt fails: its process has fewer samples, and fewer pairs, than the other."""
    values = images[:, 0].mean((1, 2))
    failed = torch.tensor([method in ("ddpo", "prdp") and prompt == "gold" for prompt in prompts])
    return torch.where(failed, torch.nan, values)


out, method, weights = sys.argv[1:]
process_state()
build, kind, settings = METHODS[method]
policy = Policy.wrap(build())
policy.add_lora(rank=2, alpha=2)
if weights == "sharded":
    policy.shard_blocks()
frozen = [p for block in policy.blocks for p in block.parameters() if not p.requires_grad]
held = torch.tensor(sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in frozen))
trainer = kind(
    policy,
    redness,
    num_inference_steps=3,
    guidance_scale=2.0,
    num_prompts_per_step=4,
    learning_rate=1e-3,
    **settings,
)
found = {"held": held}
trainer.optimizer.register_step_pre_hook(
    lambda *_: found.update((f"gradient/{name}", p.grad.clone()) for name, p in policy.trainable().items())
)
rows = trainer.train(PROMPTS, steps=2).rows
rank = int(os.environ.get("RANK", "0"))
found |= {f"metric/{name}": torch.tensor([row[name] for row in rows]) for name in ("loss", "reward", "grad_norm")}
if method == "ddpo":
    found |= {f"history/{name}": torch.tensor(kept) for name, kept in trainer.history.rewards.items()}
found |= {name: p.detach() for name, p in policy.trainable().items()}
save_file(found, Path(out, f"{rank}.safetensors"))
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
