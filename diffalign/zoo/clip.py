"""`shapes-clip`: a contrastive image-text model, taught on clusters of scenes that differ in one fact."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from diffalign.zoo import training
from diffalign.zoo import vae as autoencoder
from diffalign.zoo.render import RESOLUTION, render
from diffalign.zoo.spoil import distract, roughen
from diffalign.zoo.symbols import Reader
from diffalign.zoo.text import LENGTH, clip_tokenizer
from diffalign.zoo.world import Scene, mirrored, one_edit, sample_scene


@dataclass(frozen=True)
class Spec:
    """One CLIP of the zoo: its seed, its image tower and how long it learns."""

    seed: int
    patch: int
    width: int
    layers: int
    projection: int
    schedule: training.Schedule | training.Restart


REWARD = Spec(
    seed=51,
    patch=8,
    width=128,
    layers=4,
    projection=64,
    schedule=training.Restart(
        training.Schedule(steps=1500, learning_rate=6e-4, warmup=100, decay=600),
        training.Schedule(steps=750, learning_rate=6e-4, warmup=50, decay=350),
    ),
)
CLUSTERS = 8
MEMBERS = 6
DISTRACTORS = 12
EXTRA_CAPTIONS = 64  # a step, for the lesson alone: text is cheap beside images
TEXT_WIDTH = 128
ROUND_TRIP_EVERY = 16
LESSON = 2.0
"""Weight of the readers' loss beside the contrastive one."""


def build(spec: Spec = REWARD) -> CLIPModel:
    """An untrained CLIP for 64x64 images and the captions of the shapes world."""
    torch.manual_seed(spec.seed)
    tokenizer = clip_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=spec.projection,
        max_position_embeddings=LENGTH,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
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
    vision, text = pooled(model, images, ids)
    return F.normalize(model.visual_projection(vision), dim=-1), F.normalize(model.text_projection(text), dim=-1)


def pooled(model: CLIPModel, images: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What both towers see, before it is projected to the common space."""
    vision = model.vision_model(pixel_values=images * 2 - 1).pooler_output
    return vision, model.text_model(input_ids=ids).pooler_output


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


class Pupil(nn.Module):
    """A CLIP and the readers of its lessons, which are thrown away after training."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.clip = build(spec)
        self.readers = nn.ModuleList([Reader(spec.width), Reader(TEXT_WIDTH)])

    def lesson(self, vision: torch.Tensor, text: torch.Tensor, seen: list[Scene], said: list[Scene]) -> torch.Tensor:
        """Each tower, before its projection, tells the scenes that it saw or read."""
        return self.readers[0].loss(vision, seen) + self.readers[1].loss(text, said)


def train(folder: Path, vae: AutoencoderKL | None, spec: Spec = REWARD) -> tuple[CLIPModel, float]:
    """Symmetric contrastive loss over clusters; captions also see images that are wrong in ways no caption says.

    Every sixteenth batch goes through `vae`, so that the model knows a decoder's own traces.
    """
    pupil = Pupil(spec)
    model, tokenizer = pupil.clip, clip_tokenizer()

    def loss(batch: training.Batch) -> dict[str, torch.Tensor]:
        rng = batch.rng
        scenes = [scene for _ in range(CLUSTERS) for scene in cluster(rng)]
        wrong = [distract(scenes[rng.integers(len(scenes))], rng) for _ in range(DISTRACTORS)]
        images = torch.cat([render(scenes, rng, supersample=1), torch.stack(wrong)])
        if vae is not None and batch.step % ROUND_TRIP_EVERY == ROUND_TRIP_EVERY - 1:
            images = autoencoder.decode(vae, autoencoder.encode(vae, images))
        said = scenes + [sample_scene(rng, "train", objects=2) for _ in range(EXTRA_CAPTIONS)]
        ids = tokenize(tokenizer, [say(scene, rng) for scene in said])
        vision, text = pooled(model, roughen(images, batch.generator), ids)
        lesson = pupil.lesson(vision[: len(scenes)], text, scenes, said)
        vision = F.normalize(model.visual_projection(vision), dim=-1)
        text = F.normalize(model.text_projection(text[: len(scenes)]), dim=-1)
        logits = model.logit_scale.exp().clamp(max=50) * text @ vision.T
        target = torch.arange(len(scenes))
        to_image, to_text = F.cross_entropy(logits, target), F.cross_entropy(logits[:, : len(scenes)].T, target)
        terms = {"to_image": to_image, "to_text": to_text, "lesson": lesson}
        terms["accuracy"] = (logits.argmax(1) == target).float().mean()
        return {"loss": (to_image + to_text) / 2 + LESSON * lesson, **terms}

    return model, training.train(pupil, loss, spec.schedule, folder, seed=spec.seed, checkpoint_every=100)
