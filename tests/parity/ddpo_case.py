"""Steps of several chains, and rewards of several prompts, with what diffalign's DDPO makes of them.

    python -m tests.parity.ddpo_case FOLDER

writes case.json and tensors.safetensors, all in float64, for `ddpo.py`. A chain's tensors are (N, B, ...), one row for
each of its steps.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from diffalign.finetune import DDPO
from diffalign.finetune.advantages import PromptHistory
from diffalign.laws import Prediction
from diffalign.policies import Policy
from diffalign.policies.tiny import tiny_sd

CHAINS = {
    # name: (changes to Stable Diffusion's scheduler, steps)
    "leading": ({}, 20),
    "of a stride that does not divide 1000": ({"prediction_type": "v_prediction"}, 30),
    "trailing": ({"prediction_type": "sample", "timestep_spacing": "trailing"}, 30),
    "to no noise": ({"timestep_spacing": "trailing", "set_alpha_to_one": True}, 10),
}
SAMPLES, SHIFT, CLIP_RANGE, HISTORY = 4, 3e-3, 1e-4, {"size": 10, "least": 6}


def chain(name, generator):
    """(settings for the peer, tensors) of a chain; where a step has no density, NaN."""
    changes, steps = CHAINS[name]
    policy = Policy.wrap(tiny_sd(**changes))
    trainer = DDPO(policy, lambda *_: None, num_inference_steps=steps, clip_range=CLIP_RANGE)
    schedule, law, scheduler = trainer.schedule, trainer.law(), policy.pipe.scheduler

    def normal(*shape):
        return torch.randn(SAMPLES, *shape, generator=generator, dtype=torch.float64)

    def step(output, x, i):
        prediction = Prediction(output, x, schedule.level(i).expand(SAMPLES), policy.prediction_kind())
        return law.step(prediction, schedule.target(i).expand(SAMPLES))

    rows = []
    for i in range(steps):
        x, before, advantages = normal(4, 8, 8), normal(4, 8, 8), normal()
        output = (before + SHIFT * normal(4, 8, 8)).requires_grad_()
        old, now = step(before, x, i), step(output, x, i)
        row = {"x": x, "before": before, "output": output.detach(), "advantages": advantages}
        row |= {"next": old.sample(normal(4, 8, 8)).detach()}
        row |= dict.fromkeys(("log_prob", "loss", "clipped"), torch.tensor(torch.nan, dtype=torch.float64))
        row |= {"log_prob": row["log_prob"].expand(SAMPLES), "gradient": torch.full_like(x, torch.nan)}
        if bool((old.std > 0).all()):
            log_ratio = trainer.log_ratio(now, old, row["next"])
            loss = trainer.policy_loss(log_ratio, advantages).mean()
            loss.backward()
            clipped = ((log_ratio.exp() - 1).abs() > CLIP_RANGE).double().mean()
            row |= {"log_prob": now.log_prob(row["next"], "mean").detach(), "gradient": output.grad}
            row |= {"loss": loss.detach(), "clipped": clipped}
        rows.append(row)
    tensors = {key: torch.stack([row[key] for row in rows]).contiguous() for key in rows[0]}
    tensors |= {"timesteps": schedule.timesteps.long(), "alphas_cumprod": scheduler.alphas_cumprod.double()}
    settings = {"prediction_type": policy.prediction_kind(), "clip_range": CLIP_RANGE, "eta": law.eta}
    settings |= {"final_alpha_cumprod": float(scheduler.final_alpha_cumprod)}
    settings |= {"max_advantage": trainer.config.max_advantage}
    return settings, tensors


def history():
    """Steps of two prompts of five, four samples each, and their advantages: (20, 2, 4)."""
    draw, tracker = np.random.default_rng(0), PromptHistory(**HISTORY)
    ids = [sorted(draw.choice(5, 2, replace=False).tolist()) for _ in range(20)]
    rewards = torch.from_numpy(draw.normal(size=(20, 2, 4)) + 3 * np.array(ids)[:, :, None])
    advantages = torch.stack([tracker(row, names) for row, names in zip(rewards, ids, strict=True)])
    return ids, {"rewards": rewards, "advantages": advantages}


def write_case(folder):
    generator, case, tensors = torch.Generator().manual_seed(0), {}, {}
    for name in CHAINS:
        case[name], found = chain(name, generator)
        tensors |= {f"{name}/{key}": value for key, value in found.items()}
    ids, found = history()
    tensors |= {f"history/{key}": value for key, value in found.items()}
    save_file(tensors, folder / "tensors.safetensors")
    (folder / "case.json").write_text(json.dumps({"chains": case, "history": HISTORY | {"ids": ids}}))


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    write_case(Path(sys.argv[1]))
