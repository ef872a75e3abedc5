"""Images a second of scorers at real size, with random weights: batched, one by one, and three rewards on one encoder.

    python tests/benchmarks/scorers.py [--images 8] [--repeats 3] [--towers clip-l ...] [--peer PYTHON BPE]

Weights are random, so that nothing is downloaded; prompts are encoded once and kept, as in a run, and do not count. On
a GPU weights are bfloat16. The bound is that of arithmetic: FLOPs of the image tower over the measured matrix rate of
this machine. Three rewards on one encoder (CLIP score and both aesthetic heads on CLIP ViT-L/14) share one pass of it.
`--peer PYTHON BPE` (tests/parity/clip_family.py says which) times the hpsv2 package, which scores one image after
another and reads the checkpoint in every call, beside ours on the same weights, of ViT-L/14's size, and images.
Ratios are from one run.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from diffalign._compat import ensure_torchvision  # noqa: E402

ensure_torchvision()

from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, SiglipVisionConfig, SiglipVisionModel  # noqa: E402

from diffalign import media  # noqa: E402
from diffalign.noise import normal  # noqa: E402
from diffalign.rewards import weighted_sum  # noqa: E402
from diffalign.rewards.aesthetic import AestheticReward  # noqa: E402
from diffalign.rewards.clip import CLIPReward  # noqa: E402
from diffalign.rewards.encoders import DualEncoder  # noqa: E402
from diffalign.rewards.hps import HPSReward  # noqa: E402
from diffalign.rewards.preprocessing import ClipPreprocessing  # noqa: E402
from diffalign.zoo.open_clip_export import state_dict  # noqa: E402
from tests.benchmarks.real_size import seconds  # noqa: E402
from tests.parity import clip_family_case  # noqa: E402

PIXELS = 512  # side of the images that are scored


def tower(width, inner, layers, heads, patch):
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size")
    return dict(zip(names, (width, inner, layers, heads, patch), strict=True))


TOWERS = {
    "clip-l": (CLIPVisionModelWithProjection, CLIPVisionConfig(**tower(1024, 4096, 24, 16, 14), projection_dim=768)),
    "clip-h": (CLIPVisionModelWithProjection, CLIPVisionConfig(**tower(1280, 5120, 32, 16, 14), projection_dim=1024)),
    "siglip-so400m": (SiglipVisionModel, SiglipVisionConfig(**tower(1152, 4304, 27, 16, 14), image_size=384)),
}


class RandomTower(DualEncoder):
    """An image tower of real size; every prompt has the same embedding."""

    def __init__(self, name, device):
        super().__init__()
        kind, config = TOWERS[name]
        with torch.device(device):
            self.model = kind(config).to(torch.bfloat16 if device.type == "cuda" else torch.float32)
        self.model.eval().requires_grad_(False)
        self.preprocessing = ClipPreprocessing(config.image_size, (config.image_size,) * 2, "bicubic")
        self.label, self.token_limit = name, 77
        self.width = getattr(config, "projection_dim", None) or config.hidden_size

    @property
    def image_width(self):
        return self.width

    def encode_images(self, pixels):
        output = self.model(pixel_values=pixels)
        return output.image_embeds if "image_embeds" in output else output.pooler_output

    def encode_text(self, prompt):
        return torch.ones(self.width, device=self.device)

    def count_tokens(self, prompt):
        return 0


def fastest(work, device, repeats):
    """Seconds of the fastest of some runs after one to warm up."""
    return min([seconds(work, device) for _ in range(repeats + 1)][1:])


def matrix_rate(like):
    """FLOPs a second of a large product in the type, and on the device, of a tensor."""
    size = 8192 if like.is_cuda else 2048
    a, b = (torch.randn(size, size).to(like) for _ in range(2))
    return 2 * size**3 / fastest(lambda: a @ b, like.device, 5)


def alone(encoder, images, repeats):
    """One reward: batched and one by one, beside the bound."""
    reward, prompts = CLIPReward(encoder), ["a red circle"] * len(images)
    with FlopCounterMode(display=False) as counter:
        reward(images[:1], prompts[:1])
    flops = counter.get_total_flops()
    batched = fastest(lambda: reward(images, prompts), images.device, repeats)
    singly = fastest(
        lambda: [reward(images[i : i + 1], prompts[:1]) for i in range(len(images))], images.device, repeats
    )
    return {
        "images_per_s": len(images) / batched,
        "one_by_one": batched / singly,
        "of_the_bound": flops * len(images) / matrix_rate(next(encoder.model.parameters())) / batched,
        "gflops_per_image": flops / 1e9,
    }


def shared(encoder, images, repeats, folder):
    """Cost of three rewards on one encoder over that of one, and over that of three that share nothing."""
    heads = []
    for name in ("v1", "v2"):
        file = Path(folder, f"{name}.safetensors")
        save_file({"weight": torch.randn(1, encoder.image_width), "bias": torch.zeros(1)}, file)
        heads.append(AestheticReward(encoder, file, name=name))
    prompts = ["a red circle"] * len(images)
    rewards = [CLIPReward(encoder, name="clip"), *heads]
    three = weighted_sum([(reward, 1.0) for reward in rewards])
    one = fastest(lambda: rewards[0](images, prompts), images.device, repeats)
    together = fastest(lambda: three(images, prompts), images.device, repeats)
    apart = fastest(lambda: [reward(images, prompts) for reward in rewards], images.device, repeats)
    return {"three_over_one": together / one, "three_apart_over_one": apart / one}


def peer(python, bpe, count, folder):
    """Seconds of hpsv2's loop over ours, batched; both of `count` images, each with its own prompt."""
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = Path(folder)
    text = tower(64, 256, 2, 2, 0) | {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}
    vision = TOWERS["clip-l"][1].to_dict() | {"hidden_act": "gelu"}
    config = CLIPConfig(text_config=text | {"hidden_act": "gelu"}, vision_config=vision, projection_dim=768)
    model = CLIPModel(config)
    config.save_pretrained(folder / "clip")
    clip_family_case.tokenizer(bpe).save_pretrained(folder / "clip")
    CLIPImageProcessorPil().save_pretrained(folder / "clip")
    torch.save({"state_dict": state_dict(model)}, folder / "HPS_v2.1_compressed.pt")
    del model
    pictures = [clip_family_case.picture((PIXELS, PIXELS), seed) for seed in range(count)]
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number}.png")
    prompts = [f"a picture of number {number}" for number in range(count)]
    reward, images = HPSReward(folder / "HPS_v2.1_compressed.pt", folder / "clip"), media.from_pil(pictures)
    found = reward(images, prompts).value.tolist()  # warms up, and encodes the prompts
    ours = seconds(lambda: reward(images, prompts), images.device)
    sizes = {"image_size": 224, "layers": 24, "width": 1024, "head_width": 64, "patch_size": 14}
    case = {"hps": found, "prompts": prompts, "vision": sizes, "text": clip_family_case.TEXT, "embed_dim": 768}
    (folder / "case.json").write_text(json.dumps(case))

    command = [python, str(ROOT / "tests/parity/clip_family.py"), str(folder), bpe, "--seconds"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    theirs = json.loads(done.stdout.splitlines()[-1])
    return {"hpsv2_over_ours": theirs["seconds"] / ours, "largest_difference": theirs["largest_difference"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--towers", nargs="+", choices=TOWERS, default=list(TOWERS))
    parser.add_argument("--peer", nargs=2, metavar=("PYTHON", "BPE"))
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    noise = normal((3, PIXELS, PIXELS), seed=0, purpose="benchmark", rows=[(i,) for i in range(args.images)])
    images = (0.5 + 0.2 * noise).clamp(0, 1).to(device)
    print(f"{device}, {torch.get_num_threads()} threads, {args.images} images of {PIXELS} pixels", flush=True)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for name in args.towers:
            encoder = RandomTower(name, device)
            figures = alone(encoder, images, args.repeats)
            if name == "clip-l":
                figures |= shared(encoder, images, args.repeats, folder)
            print(f"{name}: " + ", ".join(f"{key} {value:.3g}" for key, value in figures.items()), flush=True)
        if args.peer:
            figures = peer(*args.peer, args.images, folder)
            print("hpsv2's loop: " + ", ".join(f"{key} {value:.3g}" for key, value in figures.items()), flush=True)


if __name__ == "__main__":
    main()
