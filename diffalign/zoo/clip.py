"""`shapes-clip`: a contrastive image-text model, taught on clusters of scenes that differ in one fact."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from diffalign.zoo import reading, training
from diffalign.zoo import vae as autoencoder
from diffalign.zoo.render import RESOLUTION, Layout, lay_out
from diffalign.zoo.spoil import bend, distract, roughen
from diffalign.zoo.symbols import Reader, bits, facts
from diffalign.zoo.text import clip_tokenizer, text_config, tokenize
from diffalign.zoo.world import SHAPES, Scene, one_edit, sample_scene, say


@dataclass(frozen=True)
class Spec:
    """One CLIP of the zoo: its seed, its image tower and how long it learns; the second half is the fine course."""

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
    schedule=training.Schedule(steps=2000, learning_rate=1e-3, warmup=100, decay=1000),
)
BATCH = 48
MEMBERS = 6
DISTRACTORS = 12
ROUND_TRIP_EVERY = 16
NEAR = torch.tensor([1.0] * len(SHAPES) + [0.1])
"""Weight of a patch near each shape, and of one near none: most are near none."""
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


def embed(model: CLIPModel, images: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors of images (B, 3, 64, 64) in [0, 1] and of token ids (N, LENGTH)."""
    vision = model.vision_model(pixel_values=images * 2 - 1).pooler_output
    text = model.text_model(input_ids=ids).pooler_output
    return F.normalize(model.visual_projection(vision), dim=-1), F.normalize(model.text_projection(text), dim=-1)


def cluster(rng: np.random.Generator, members: int = MEMBERS, extra: Sequence[str] = ()) -> list[Scene]:
    """A train scene and neighbours that differ from it in one fact, one for each kind of fact in turn, then `extra`."""
    scene = sample_scene(rng, "train", objects=2 if rng.random() < 0.85 else 1)
    edits = one_edit(scene)
    kinds = [*edits, *extra]
    rng.shuffle(kinds)
    chosen, used = [scene], {scene.caption}
    for i in range(64):
        options = edits[kinds[i % len(kinds)]]
        option = options[rng.integers(len(options))]
        if option.caption not in used:
            chosen.append(option)
            used.add(option.caption)
        if len(chosen) == members:
            break
    return chosen


def clusters(rng: np.random.Generator, fine: bool) -> list[Scene]:
    """A batch of clusters; in the fine course they have more neighbours, and more of them with another shape."""
    if fine:
        return [scene for _ in range(BATCH // 8) for scene in cluster(rng, 8, extra=("shape", "shape"))]
    return [scene for _ in range(BATCH // MEMBERS) for scene in cluster(rng)]


def wrong_images(scenes: Sequence[Scene], rng: np.random.Generator, fine: bool) -> torch.Tensor:
    """(DISTRACTORS, 3, 64, 64) that no caption says; in the fine course most are only a little out of shape."""
    ways = [bend if fine and i % 3 else distract for i in range(DISTRACTORS)]
    return torch.stack([way(scenes[rng.integers(len(scenes))], rng) for way in ways])


class Eye(nn.Module):
    """The image tower's lesson: every patch tells which object covers it, the pooled image tells them all.

    Patches speak before the last layer, in which the pooled state collects what they know. They also tell the shape
    whose outline is near, whatever its colour and place: mixed with those, a square's corners are never noticed. Thrown
    away after training.
    """

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.patch = spec.patch
        self.patches, self.image = Reader(spec.width), Reader(spec.width)
        self.outline = nn.Linear(spec.width, len(SHAPES) + 1)

    def loss(self, vision: BaseModelOutputWithPooling, scenes: Sequence[Scene], layout: Layout) -> torch.Tensor:
        """Of the first images of `vision`, which show `scenes` as `layout` places them."""
        middle = (torch.arange(RESOLUTION // self.patch) + 0.5) * self.patch
        x, y = torch.meshgrid(middle, middle, indexing="xy")
        grid = torch.stack([x, y], -1).flatten(0, 1)
        distance = (grid[None, :, None] - layout.center[:, None]).norm(dim=-1)
        here = (distance < layout.radius[:, None]).float() @ torch.stack([facts(scene) for scene in scenes])
        tokens = vision.hidden_states[-2][: len(scenes), 1:]
        told = self.patches.loss(tokens, here) + self.image.loss(vision.pooler_output[: len(scenes)], bits(scenes))
        near = (distance < 1.2 * layout.radius[:, None] + 2) & (layout.shape[:, None] >= 0)
        shape = torch.where(near, layout.shape[:, None], len(SHAPES)).amin(-1)
        outline = F.cross_entropy(self.outline(tokens).movedim(-1, 1), shape, weight=NEAR)
        return told + outline / 2


def train(folder: Path, vae: AutoencoderKL | None, spec: Spec = REWARD) -> tuple[CLIPModel, float]:
    """Symmetric contrastive loss over clusters; captions also see images that are wrong in ways no caption says.

    Every sixteenth batch goes through `vae`, so that the model knows a decoder's own traces.
    """
    model, tokenizer = build(spec), clip_tokenizer()
    states = reading.states(model.text_model)
    seconds = reading.teach(model.text_model, states, tokenizer, folder / "reading", spec.seed)
    eye = Eye(spec)

    def loss(batch: training.Batch) -> dict[str, torch.Tensor]:
        rng = batch.rng
        fine = 2 * batch.step >= spec.schedule.steps
        scenes = clusters(rng, fine)
        layout = lay_out(scenes, rng)
        images = torch.cat([layout.draw(supersample=1), wrong_images(scenes, rng, fine)])
        if vae is not None and batch.step % ROUND_TRIP_EVERY == ROUND_TRIP_EVERY - 1:
            images = autoencoder.decode(vae, autoencoder.encode(vae, images))
        images = roughen(images, batch.generator)
        text = model.text_model(input_ids=tokenize(tokenizer, [say(scene, rng) for scene in scenes])).pooler_output
        said = F.normalize(model.text_projection(text), dim=-1)
        vision = model.vision_model(pixel_values=images * 2 - 1, output_hidden_states=True)
        lesson = eye.loss(vision, scenes, layout)
        seen = F.normalize(model.visual_projection(vision.pooler_output), dim=-1)
        logits = model.logit_scale.exp().clamp(max=50) * said @ seen.T
        target = torch.arange(len(scenes))
        to_image, to_text = F.cross_entropy(logits, target), F.cross_entropy(logits[:, : len(scenes)].T, target)
        terms = {"to_image": to_image, "to_text": to_text, "lesson": lesson}
        terms["accuracy"] = (logits.argmax(1) == target).float().mean()
        return {"loss": (to_image + to_text) / 2 + LESSON * lesson, **terms}

    pupil = nn.ModuleDict({"clip": model, "eye": eye})
    return model, seconds + training.train(pupil, loss, spec.schedule, folder, seed=spec.seed, checkpoint_every=100)
