"""Trains a tiny pipeline for two steps as one of several processes: `two_processes.py OUT sd|sd3 whole|sharded`.

Writes the adapter, the metrics and how much of the blocks' frozen weights this process holds.
"""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[2]))

from diffalign.finetune import RewardBackprop
from diffalign.policies import Policy
from diffalign.policies.tiny import tiny_sd, tiny_sd3
from diffalign.processes import process_state

out, build, weights = sys.argv[1:]
process_state()
policy = Policy.wrap({"sd": tiny_sd, "sd3": tiny_sd3}[build]())
policy.add_lora(rank=2, alpha=2)
if weights == "sharded":
    policy.shard_blocks()
frozen = [p for block in policy.blocks for p in block.parameters() if not p.requires_grad]
held = torch.tensor(sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in frozen))
trainer = RewardBackprop(
    policy,
    lambda images, prompts, metadata: images[:, 0].mean((1, 2)),
    num_inference_steps=3,
    guidance_scale=2.0,
    num_prompts_per_step=4,
    gradient={"kind": "random_k", "high": 3},
    learning_rate=1e-3,
)
rows = trainer.train(["red", "blue", "green", "gold"], steps=2).rows
rank = int(os.environ.get("RANK", "0"))
metrics = {f"metric/{name}": torch.tensor([row[name] for row in rows]) for name in ("loss", "reward", "grad_norm")}
save_file(
    {name: p.detach() for name, p in policy.trainable().items()} | metrics | {"held": held},
    Path(out, f"{rank}.safetensors"),
)
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
