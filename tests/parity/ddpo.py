"""trl's DDPO, step by step and prompt by prompt, against the figures in a folder; needs no diffalign.

    python -m venv ENV
    ENV/bin/pip install torch==2.13.0 transformers==4.36.2 numpy
    ENV/bin/pip install --no-deps trl==0.23.1
    python -m tests.parity.ddpo_case FOLDER
    ENV/bin/python tests/parity/ddpo.py FOLDER

prints one JSON line a chain and one of the per-prompt statistics. What is done to trl, here and in memory:

- what it imports for other trainers, and is not installed, is an empty module; so is diffusers, of whose scheduler it
  reads a few tables, which the folder has;
- its U-Net gives the folder's predictions, and its trainer is what `calculate_loss` reads of one.

Its arithmetic of timesteps is not diffusers' in the last step: a target below timestep 0 is clamped to 0 before it is
compared with 0, so that `final_alpha_cumprod` is never read. Where that is 1 (`set_alpha_to_one`) diffusers' sampler
ends without noise, and there is no density to compare; trl steps to timestep 0 and adds noise. Its log-densities of
such steps are in `elsewhere`.
"""

import contextlib
import functools
import importlib
import json
import logging
import sys
import types
import warnings
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import transformers.utils
from beside import EmptyFinder
from safetensors.torch import load_file

EMPTY = ("accelerate", "diffusers", "peft", "datasets", "pandas")


def prepare():
    """(scheduler_step, DDPOTrainer, PerPromptStatTracker) of trl."""
    sys.meta_path.append(EmptyFinder(EMPTY))
    accelerate = importlib.import_module("accelerate")
    accelerate.logging = types.ModuleType("logging")
    accelerate.logging.get_logger = logging.getLogger
    for name in ("is_rich_available", "is_torch_mlu_available"):  # of a transformers later than this
        setattr(transformers.utils, name, getattr(transformers.utils, name, bool))
    importlib.import_module("trl.import_utils")._diffusers_available = True
    step = importlib.import_module("trl.models.modeling_sd_base").scheduler_step
    trainer = importlib.import_module("trl.trainer.ddpo_trainer").DDPOTrainer
    return step, trainer, importlib.import_module("trl.trainer.utils").PerPromptStatTracker


def relative(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def of_chain(name, settings, ours, scheduler_step, trainer):
    """Largest differences over the steps that have a density; the gradient is that by the network's output."""
    config = {"num_train_timesteps": len(ours["alphas_cumprod"]), "prediction_type": settings["prediction_type"]}
    scheduler = SimpleNamespace(
        alphas_cumprod=ours["alphas_cumprod"],
        final_alpha_cumprod=torch.tensor(settings["final_alpha_cumprod"], dtype=torch.float64),
        num_inference_steps=len(ours["timesteps"]),
        config=SimpleNamespace(**config, thresholding=False, clip_sample=False),
    )
    step = functools.partial(scheduler_step, scheduler)
    found = {"log_prob": 0.0, "loss": 0.0, "gradient": 0.0, "clipped": 0.0}
    elsewhere, clipped = [], []
    for i, timestep in enumerate(ours["timesteps"]):
        row = {key: value[i] for key, value in ours.items() if key not in ("timesteps", "alphas_cumprod")}
        at, output = timestep.expand(len(row["x"])), row["output"].clone().requires_grad_()
        chain = {"eta": settings["eta"], "prev_sample": row["next"]}
        old = step(row["before"], at, row["x"], **chain).log_probs
        now = step(row["output"], at, row["x"], **chain).log_probs
        if row["log_prob"].isnan().any():
            elsewhere.append({"timestep": int(timestep), "log_prob": str(float(now.mean()))})
            continue
        self = SimpleNamespace(
            autocast=contextlib.nullcontext,
            config=SimpleNamespace(
                train_cfg=False,
                sample_eta=settings["eta"],
                train_adv_clip_max=settings["max_advantage"],
                train_clip_range=settings["clip_range"],
            ),
            sd_pipeline=SimpleNamespace(unet=lambda *_, o=output: SimpleNamespace(sample=o), scheduler_step=step),
            loss=functools.partial(trainer.loss, None),
        )
        loss, _, share = trainer.calculate_loss(self, row["x"], at, row["next"], old, row["advantages"], None)
        loss.backward()
        clipped.append(float(share))
        differences = {"log_prob": float((now - row["log_prob"]).abs().max()), "loss": relative(loss, row["loss"])}
        differences |= {"gradient": relative(output.grad, row["gradient"]), "clipped": float(share - row["clipped"])}
        found = {key: max(value, abs(differences[key])) for key, value in found.items()}
    result = {"chain": name, "steps": len(clipped), "largest_difference": found, "elsewhere": elsewhere}
    return result | {"clipped": float(np.mean(clipped))}


def of_history(settings, ours, tracker):
    """Largest relative difference of the advantages; trl adds 1e-6 to the deviation that it divides by."""
    tracker = tracker(settings["size"], settings["least"])
    worst = 0.0
    for ids, rewards, advantages in zip(settings["ids"], ours["rewards"], ours["advantages"], strict=True):
        names = [str(name) for name in ids for _ in rewards[0]]
        found = torch.from_numpy(tracker.update(names, rewards.flatten().numpy())).reshape(rewards.shape)
        worst = max(worst, relative(found, advantages))
    return {"chain": "history", "steps": len(ours["rewards"]), "largest_difference": {"advantages": worst}}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    folder, peer = Path(sys.argv[1]), {"peer": f"trl {version('trl')}"}
    case, tensors = json.loads((folder / "case.json").read_text()), load_file(folder / "tensors.safetensors")

    def part(name):
        return {key.split("/")[1]: value for key, value in tensors.items() if key.split("/")[0] == name}

    scheduler_step, trainer, tracker = prepare()
    for name, settings in case["chains"].items():
        print(json.dumps(peer | of_chain(name, settings, part(name), scheduler_step, trainer)))
    print(json.dumps(peer | of_history(case["history"], part("history"), tracker)))
