"""`shapes-clip`: a contrastive image-text model, taught on clusters of scenes that differ in one fact."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, CLIPVisionConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from diffalign.zoo import reading, training
from diffalign.zoo import vae as autoencoder
from diffalign.zoo.render import RESOLUTION, Layout, lay_out
from diffalign.zoo.spoil import distract, roughen
from diffalign.zoo.symbols import Reader, bits, facts
from diffalign.zoo.text import LENGTH, clip_tokenizer, text_config
from diffalign.zoo.world import Scene, mirrored, one_edit, sample_scene


@dataclass(frozen=True)
class Spec:
    """One CLIP of the zoo: its seed, its image tower and how long it learns."""

    seed: int
    patch: int
    width: int
    layers: int
    projection: int
    schedule: training.Schedule


REWARD = Spec(
    seed=51,
    patch=8,
    width=128,
    layers=4,
    projection=64,
    schedule=training.Schedule(steps=1800, learning_rate=1e-3, warmup=100, decay=1000),
)
CLUSTERS = 8
MEMBERS = 6
DISTRACTORS = 12
ROUND_TRIP_EVERY = 16
LESSON = 2.0
"""Weight of the reader's loss beside the contrastive one."""


def build(spec: Spec = REWARD) -> CLIPModel:
    """An untrained CLIP for 64x64 images and the captions of the shapes world."""
    torch.manual_seed(spec.seed)
    text = text_config(clip_tokenizer(), spec.projection)
    vision = CLIPVisionConfig(
        hidden_size=spec.width,
        intermediate_size=4 * spec.width,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.width // 32,
        projection_dim=spec.projection,
        image_size=RESOLUTION,
        patch_size=spec.patch,
        hidden_act="gelu",
    )
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=spec.projection)
    return CLIPModel(config)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Ids (B, LENGTH)."""
    return torch.tensor(tokenizer(captions, padding="max_length", max_length=LENGTH, truncation=True).input_ids)


def embed(model: CLIPModel, images: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors of images (B, 3, 64, 64) in [0, 1] and of token ids (N, LENGTH)."""
    vision = model.vision_model(pixel_values=images * 2 - 1).pooler_output
    text = model.text_model(input_ids=ids).pooler_output
    return F.normalize(model.visual_projection(vision), dim=-1), F.normalize(model.text_projection(text), dim=-1)


def cluster(rng: np.random.Generator) -> list[Scene]:
    """A train scene and neighbours that differ from it in one fact, one neighbour for each kind of fact in turn."""
    scene = sample_scene(rng, "train", objects=2 if rng.random() < 0.85 else 1)
    edits = one_edit(scene)
    kinds = list(edits)
    rng.shuffle(kinds)
    chosen, used = [scene], {scene.caption}
    for i in range(64):
        options = edits[kinds[i % len(kinds)]]
        option = options[rng.integers(len(options))]
        if option.caption not in used:
            chosen.append(option)
            used.add(option.caption)
        if len(chosen) == MEMBERS:
            break
    return chosen


def say(scene: Scene, rng: np.random.Generator) -> str:
    """The caption, from either object's side."""
    return (mirrored(scene) if scene.relation and rng.random() < 0.5 else scene).caption


class Eye(nn.Module):
    """The image tower's lesson: every patch tells which object covers it, the pooled image tells them all.

    Patches speak before the last layer, in which the pooled state collects what they know. Thrown away after training.
    """

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.patch = spec.patch
        self.patches, self.image = Reader(spec.width), Reader(spec.width)

    def loss(self, vision: BaseModelOutputWithPooling, scenes: Sequence[Scene], layout: Layout) -> torch.Tensor:
        """Of the first images of `vision`, which show `scenes` as `layout` places them."""
        middle = (torch.arange(RESOLUTION // self.patch) + 0.5) * self.patch
        x, y = torch.meshgrid(middle, middle, indexing="xy")
        grid = torch.stack([x, y], -1).flatten(0, 1)
        covered = (grid[None, :, None] - layout.center[:, None]).norm(dim=-1) < layout.radius[:, None]
        here = covered.float() @ torch.stack([facts(scene) for scene in scenes])
        tokens = vision.hidden_states[-2][: len(scenes), 1:]
        return self.patches.loss(tokens, here) + self.image.loss(vision.pooler_output[: len(scenes)], bits(scenes))


def train(folder: Path, vae: AutoencoderKL | None, spec: Spec = REWARD) -> tuple[CLIPModel, float]:
    """Symmetric contrastive loss over clusters; captions also see images that are wrong in ways no caption says.

    Every sixteenth batch goes through `vae`, so that the model knows a decoder's own traces.
    """
    model, tokenizer = build(spec), clip_tokenizer()
    seconds = reading.teach(model.text_model, partial(_read, model), tokenizer, folder / "reading", spec.seed)
    eye = Eye(spec)

    def loss(batch: training.Batch) -> dict[str, torch.Tensor]:
        rng = batch.rng
        scenes = [scene for _ in range(CLUSTERS) for scene in cluster(rng)]
        layout = lay_out(scenes, rng)
        wrong = [distract(scenes[rng.integers(len(scenes))], rng) for _ in range(DISTRACTORS)]
        images = torch.cat([layout.draw(supersample=1), torch.stack(wrong)])
        if vae is not None and batch.step % ROUND_TRIP_EVERY == ROUND_TRIP_EVERY - 1:
            images = autoencoder.decode(vae, autoencoder.encode(vae, images))
        images = roughen(images, batch.generator) * 2 - 1
        vision = model.vision_model(pixel_values=images, output_hidden_states=True)
        text = model.text_model(input_ids=tokenize(tokenizer, [say(scene, rng) for scene in scenes])).pooler_output
        lesson = eye.loss(vision, scenes, layout)
        seen = F.normalize(model.visual_projection(vision.pooler_output), dim=-1)
        said = F.normalize(model.text_projection(text), dim=-1)
        logits = model.logit_scale.exp().clamp(max=50) * said @ seen.T
        target = torch.arange(len(scenes))
        to_image, to_text = F.cross_entropy(logits, target), F.cross_entropy(logits[:, : len(scenes)].T, target)
        terms = {"to_image": to_image, "to_text": to_text, "lesson": lesson}
        terms["accuracy"] = (logits.argmax(1) == target).float().mean()
        return {"loss": (to_image + to_text) / 2 + LESSON * lesson, **terms}

    pupil = nn.ModuleDict({"clip": model, "eye": eye})
    return model, seconds + training.train(pupil, loss, spec.schedule, folder, seed=spec.seed, checkpoint_every=100)


def _read(model: CLIPModel, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    output = model.text_model(input_ids=ids)
    return output.last_hidden_state, output.pooler_output
