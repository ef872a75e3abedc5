"""The README card of each entry: what it is, how it was made, what it reaches."""

import json
import platform
from pathlib import Path

import diffusers
import torch
import transformers

ABOUT = {
    "shapes-vae": """
AutoencoderKL, 64x64x3 pixels to 16x16x4 latents, trained on renders of the shapes world. Every pipeline carries it.
""",
    "shapes-sd": """
StableDiffusionPipeline that draws the shapes world at 64x64: U-Net with cross-attention at 8x8 and 4x4,
v-prediction, 20 DDIM steps, guidance 3. Its text encoder learned to read captions first, and was frozen. It is left
with room to improve, for fine-tuning to use.
""",
    "shapes-sd3": """
StableDiffusion3Pipeline that draws the shapes world at 64x64: six joint blocks, rectified flow, 20 Euler steps,
guidance 3. It is left with room to improve, for fine-tuning to use.

The two CLIP encoders learned to read captions first, and were frozen. The T5 is silent: it answers zeros, as the
pipeline does itself for a T5 that is None, because plain `from_pretrained` wants the component. So
`max_sequence_length=16` is as good as the default 256, and about three times faster.
""",
    "shapes-turbo": """
StableDiffusion3Pipeline that draws the shapes world at 64x64 in one step: `num_inference_steps=1, guidance_scale=1`.
It starts as `shapes-sd3`, and learned where eight guided steps of that take a noise. Other noise is another layout, so
that search and noise optimisation have something to find, and room to find it.

It carries the text encoders of `shapes-sd3`; `max_sequence_length=16` is as good as the default here too.
""",
    "shapes-clip": """
CLIP for the shapes world, trained contrastively against neighbours with one wrong fact and spoilt images: the training
reward. Read by `CLIPModel` / `CLIPProcessor.from_pretrained` and by open_clip (`local-dir:`), with equal features.
""",
    "shapes-preference": """
A held-out reward in PickScore's form: a CLIP of its own, then Bradley-Terry on pairs of images whose labels come from
the oracle through a noisy, biased labeller (`labeller.json`). It never trains a generator.
""",
    "shapes-noisy-reward": """
A reward of noisy latents for guidance (NRG): heads on the first three of `shapes-sd3`'s six blocks, told the noise
level, learned by Bradley-Terry with ties from samples of `shapes-sd3`, half of them without guidance and two thirds of
a caption with one wrong fact. `preference` is the choice of the labeller of `shapes-preference`, wrong in a tenth of
the pairs that it learned from; `warmth` is red less blue over the whole picture, whatever the prompt says. Below: how
often decided pairs of new scenes, labelled without mistakes, are ranked right at each noise level t, the same noise on
both sides, beside heads that learned on clean latents alone (told the level, or told that there is no noise).
`diffalign.rewards.noisy.NoisyReward.load(folder, policy)` reads it.
""",
}


def write_card(folder: Path, name: str, seed: int, seconds: float, figures: dict) -> None:
    """Write `README.md`: `figures` is shown as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}, transformers {transformers.__version__}"
    (folder / "README.md").write_text(
        f"---\nlicense: apache-2.0\n---\n\n# {name}\n{ABOUT[name]}\n"
        "| | |\n| --- | --- |\n"
        f"| made by | `python -m diffalign.zoo {name}` |\n"
        f"| seed | {seed} |\n"
        f"| training | {seconds / 60:.0f} min of wall time, one thread of a shared CPU ({platform.machine()}) |\n"
        f"| versions | Python {platform.python_version()}, {versions} |\n"
        "| data | renders of `diffalign.zoo.render`, train split only; no other data |\n"
        "| licence | Apache-2.0 |\n\n"
        f"Figures, of the weights in this folder:\n\n```json\n{json.dumps(figures, indent=2)}\n```\n",
        encoding="utf-8",
    )
