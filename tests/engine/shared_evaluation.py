"""Evaluates three prompts, two images each, as one of several processes: `shared_evaluation.py OUT`."""

import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[2]))

from diffalign.data import Prompt
from diffalign.engine.evaluate import sample_images, score_images
from diffalign.engine.shares import join, share
from diffalign.policies import Policy
from diffalign.policies.tiny import tiny_sd
from diffalign.processes import process_state
from diffalign.rewards import as_reward

process_state()
accelerator = Accelerator()
prompts = [Prompt(text, number, {}) for number, text in enumerate(["a bad dog", "a lake", "a red cab"])]
mine = share(prompts, accelerator.process_index, accelerator.num_processes)
part = sample_images(Policy.wrap(tiny_sd()), mine, num_inference_steps=3, guidance_scale=2.0, num_images_per_prompt=2)
part.ledger.peak_memory_bytes = 100 + accelerator.process_index
reward = as_reward(lambda images, prompts, metadata: images[:, 0].mean((1, 2)))
whole = join(score_images(part, {"red": reward}), prompts, accelerator)
assert [p.id for p in whole.prompts] == [0, 0, 1, 1, 2, 2]
tensors = {
    "images": whole.images.contiguous(),
    "red": whole.scores["red"],
    "sampled": torch.tensor(whole.ledger.decodes),
    "peak_memory": torch.tensor(whole.ledger.peak_memory_bytes),
}
save_file(tensors, Path(sys.argv[1], f"{os.environ.get('RANK', '0')}.safetensors"))
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
