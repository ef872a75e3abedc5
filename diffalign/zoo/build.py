"""From a name to a trained, written and measured entry of the zoo."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPModel

from diffalign.policies import Policy
from diffalign.zoo import clip, denoise, evaluate, export, measure, noisy, preference, turbo
from diffalign.zoo import vae as autoencoder
from diffalign.zoo.cards import write_card

TEST_PROMPTS = 256


@dataclass(frozen=True)
class Builder:
    """Builds entries into `out/zoo/NAME`, with checkpoints in `work/NAME`."""

    work: Path
    out: Path

    def build(self, name: str) -> Path:
        """Train `name`, and first what it needs, unless finished before; returns its folder."""
        folder = self.out / "zoo" / name
        if name == "shapes-vae":
            self.vae()
        elif name in denoise.FAMILIES:
            pipeline, seconds = denoise.train(name, self.work / name, self.vae())
            self._finish(pipeline, name, denoise.FAMILIES[name].SEED, seconds)
        elif name == "shapes-turbo":
            teacher = DiffusionPipeline.from_pretrained(self._built("shapes-sd3"))
            pipeline, seconds = turbo.train(self.work / name, teacher, self.vae())
            self._finish(pipeline, name, turbo.SEED, seconds)
        elif name == "shapes-noisy-reward":
            policy = Policy.from_pretrained(self._built("shapes-sd3"))
            reward, figures, seconds = noisy.build(policy, self.work / name)
            reward.save(folder)
            write_card(folder, name, noisy.SEED, seconds, figures)
        elif name == "shapes-clip":
            model, seconds = clip.train(self.work / name, self.vae())
            export.write_clip(model, folder, for_open_clip=True)
            write_card(folder, name, clip.REWARD.seed, seconds, measure.retrieval(model.eval()))
        else:
            self._preference(name, folder)
        return folder

    def vae(self) -> AutoencoderKL:
        """The shared autoencoder, in evaluation mode."""
        folder = self.out / "zoo" / "shapes-vae"
        if not (folder / "config.json").exists():
            vae, seconds = autoencoder.train(self.work / "shapes-vae")
            export.round_to_half(vae)
            vae.half().save_pretrained(folder)
            write_card(folder, "shapes-vae", autoencoder.SEED, seconds, measure.reconstruction(vae.float()))
        # Not `from_pretrained`, which writes the folder's path into the config that pipelines then carry along.
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder))
        vae.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
        return vae.eval()

    def _built(self, name: str) -> Path:
        folder = self.out / "zoo" / name
        return folder if (folder / "README.md").exists() else self.build(name)

    def _finish(self, pipeline: DiffusionPipeline, name: str, seed: int, seconds: float) -> None:
        folder = self.out / "zoo" / name
        export.write_pipeline(pipeline, folder)
        pipeline = DiffusionPipeline.from_pretrained(folder)
        figures = {}
        for split, count in (("validation", None), ("test", TEST_PROMPTS)):
            prompts = evaluate.read_prompts(self.out / "prompts" / f"shapes-{split}.jsonl", count)
            figures[split], images = evaluate.evaluate(pipeline, prompts, name=name)
        evaluate.sheet(images[:32]).quantize(64).save(folder / "samples.png", optimize=True)
        write_card(folder, name, seed, seconds, figures)

    def _preference(self, name: str, folder: Path) -> None:
        # Denoisers before they were finished: their mistakes are what a labeller sees. They stay in the work folder.
        unfinished = [self.work / family / "unfinished" for family in denoise.FAMILIES]
        for family, path in zip(denoise.FAMILIES, unfinished, strict=True):
            if not path.exists():
                denoise.train(family, self.work / family, self.vae())
        denoisers = [DiffusionPipeline.from_pretrained(path) for path in unfinished]
        model, seconds = preference.train(self.work / name, self.vae(), denoisers)
        export.write_clip(model, folder)
        preference.write_labeller(folder / "labeller.json")
        write_card(folder, name, preference.BASE.seed, seconds, measure.preferences(model.eval()))


def load_clip(folder: Path) -> CLIPModel:
    """A reward of the zoo, in single precision and evaluation mode."""
    return CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
