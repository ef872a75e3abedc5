"""The README card of each entry: what it is, how it was made, what it reaches."""

import json
import platform
from pathlib import Path

import diffusers
import torch
import transformers

ABOUT = {
    "shapes-vae": """
AutoencoderKL, 64x64x3 pixels to 16x16x4 latents, trained on renders of the shapes world. Both pipelines carry it.
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
    "shapes-clip": """
CLIP for the shapes world, trained contrastively against neighbours with one wrong fact and spoilt images: the training
reward. Read by `CLIPModel` / `CLIPProcessor.from_pretrained` and by open_clip (`local-dir:`), with equal features.
""",
    "shapes-preference": """
A held-out reward in PickScore's form: a CLIP of its own, then Bradley-Terry on pairs of images whose labels come from
the oracle through a noisy, biased labeller (`labeller.json`). It never trains a generator.
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
