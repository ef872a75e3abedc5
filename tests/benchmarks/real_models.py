"""Random weights of the real classes at real size, and of the same classes tiny.

The configs are those that the checkpoints publish beside their weights: Stable Diffusion 1.5, Stable Diffusion XL base
1.0, Stable Diffusion 3.5 medium and FLUX.1-dev. Prompts are encoded once and kept, so that the text encoders do not
count: they are small ones of the real widths and as many tokens as the real ones have.
"""

from dataclasses import dataclass, field, replace

import torch

from diffalign._compat import ensure_torchvision

ensure_torchvision()

import diffusers  # noqa: E402
import transformers  # noqa: E402

from diffalign.policies.tiny import BETAS, clip_config, clip_tokenizer, finish, t5_encoder, t5_tokenizer  # noqa: E402


@dataclass(frozen=True)
class Model:
    """A pipeline to build.

    Attributes:
        pipeline: class of the pipeline.
        denoiser: component, class and config of the denoiser.
        vae: config of the AutoencoderKL.
        scheduler: class and config of the scheduler.
        clip: class and width of each of CLIP's text encoders.
        t5: width of T5, 0 for none.
        tokens: of an encoded prompt, all encoders together.
        pooled: width of the pooled prompt, 0 for none.
        guidance_scale: that of the pipeline's documentation.
        settings: other arguments of the pipeline.
        offload: the blocks of the denoiser wait in main memory.
    """

    pipeline: str
    denoiser: tuple[str, str, dict]
    vae: dict
    scheduler: tuple[str, dict]
    clip: tuple[tuple[str, int], ...]
    guidance_scale: float
    t5: int = 0
    tokens: int = 77
    pooled: int = 0
    settings: dict = field(default_factory=dict)
    offload: bool = False


VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 1024,
}
VAE_16 = VAE | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}

SD15 = Model(
    pipeline="StableDiffusionPipeline",
    denoiser=(
        "unet",
        "UNet2DConditionModel",
        {
            "sample_size": 64,
            "block_out_channels": (320, 640, 1280, 1280),
            "layers_per_block": 2,
            "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
        },
    ),
    vae=VAE | {"sample_size": 512, "scaling_factor": 0.18215},
    scheduler=("PNDMScheduler", BETAS | {"set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1}),
    clip=(("CLIPTextModel", 768),),
    guidance_scale=7.5,
    settings={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
)
SDXL = Model(
    pipeline="StableDiffusionXLPipeline",
    denoiser=(
        "unet",
        "UNet2DConditionModel",
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "layers_per_block": 2,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
    vae=VAE | {"scaling_factor": 0.13025},
    scheduler=("EulerDiscreteScheduler", BETAS | {"timestep_spacing": "leading", "steps_offset": 1}),
    clip=(("CLIPTextModel", 768), ("CLIPTextModelWithProjection", 1280)),
    pooled=1280,
    guidance_scale=5.0,
    settings={"add_watermarker": False},
)
SD35M = Model(
    pipeline="StableDiffusion3Pipeline",
    denoiser=(
        "transformer",
        "SD3Transformer2DModel",
        {
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 24,
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
    ),
    vae=VAE_16 | {"scaling_factor": 1.5305, "shift_factor": 0.0609},
    scheduler=("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    clip=(("CLIPTextModelWithProjection", 768), ("CLIPTextModelWithProjection", 1280)),
    t5=4096,
    tokens=77 + 256,
    pooled=768 + 1280,
    guidance_scale=4.5,
)
FLUX1 = Model(
    pipeline="FluxPipeline",
    denoiser=(
        "transformer",
        "FluxTransformer2DModel",
        {
            "patch_size": 1,
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
            "axes_dims_rope": (16, 56, 56),
        },
    ),
    vae=VAE_16 | {"scaling_factor": 0.3611, "shift_factor": 0.1159},
    scheduler=("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_dynamic_shifting": True}),
    clip=(("CLIPTextModel", 768),),
    t5=4096,
    tokens=512,
    pooled=768,
    guidance_scale=3.5,
    offload=True,
)

REAL = {"sd15": SD15, "sdxl": SDXL, "sd35m": SD35M, "flux1": FLUX1}


def _tiny(model: Model, width: int, denoiser: dict, vae: dict | None = None) -> Model:
    """The model with another denoiser and narrow encoders and decoder; images of eight times the latent's side."""
    component, kind, config = model.denoiser
    narrow = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 64}
    return replace(
        model,
        denoiser=(component, kind, config | denoiser),
        vae=model.vae | narrow,
        clip=tuple((name, width) for name, _ in model.clip),
        t5=model.t5 and width * len(model.clip),
        pooled=model.pooled and width * (2 if kind.startswith("SD3") else 1),
    )


UNET = {"sample_size": 8, "layers_per_block": 1, "norm_num_groups": 8}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
TINY = {
    "sd15": _tiny(SD15, 16, UNET | {"block_out_channels": (16, 16, 32, 32), "cross_attention_dim": 16}),
    "sdxl": _tiny(
        SDXL,
        16,
        UNET
        | {
            "block_out_channels": (16, 16, 32),
            "transformer_layers_per_block": (1, 1, 2),
            "cross_attention_dim": 32,
            "attention_head_dim": (1, 2, 2),
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 16 + 6 * 8,
        },
    ),
    "sd35m": _tiny(
        SD35M,
        16,
        HEADS
        | {
            "sample_size": 8,
            "num_layers": 2,
            "joint_attention_dim": 32,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 32,
            "pos_embed_max_size": 8,
            "dual_attention_layers": (0,),
        },
    ),
    "flux1": _tiny(
        FLUX1,
        16,
        HEADS
        | {
            "num_layers": 2,
            "num_single_layers": 2,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 16,
            "axes_dims_rope": (4, 4, 8),
        },
    ),
}


def build(model, device):
    """The pipeline in bfloat16 on a device; on "meta" everything has a shape and nothing has memory."""
    component, kind, config = model.denoiser
    torch.set_default_dtype(torch.bfloat16)  # so that nothing is made in fp32 and cast
    try:
        with torch.device("meta"):
            parts = {component: getattr(diffusers, kind)(**config), "vae": diffusers.AutoencoderKL(**model.vae)}
    finally:
        torch.set_default_dtype(torch.float32)
    if torch.device(device).type != "meta":
        fill(parts["vae"], device)
        fill_parts(parts[component], device, "cpu" if model.offload else device)
    scheduler, settings = model.scheduler
    parts["scheduler"] = getattr(diffusers, scheduler)(**settings)
    pipe = getattr(diffusers, model.pipeline)(**parts, **_encoders(model, device), **model.settings)
    pipe.default_sample_size = model.vae["sample_size"] // 8  # FLUX's transformer has none of its own
    return finish(pipe, torch.bfloat16)


def fill_parts(denoiser, device, home):
    """Fill one block after another, so that the device need never hold all; `home` is where they then wait."""
    for child in denoiser.children():
        for part in child if isinstance(child, torch.nn.ModuleList) else [child]:
            fill(part, device)
            part.to(home)


def fill(module, device):
    """Random weights in place of those on the meta device: activations keep their size, norms start as ever."""
    module.to_empty(device=device)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.ndim > 1:
                tensor.normal_(std=tensor[0].numel() ** -0.5)
            else:
                tensor.fill_(0.0 if name.endswith("bias") else 1.0)


def _encoders(model, device):
    parts = {}
    with torch.device(device):
        for number, (kind, width) in enumerate(model.clip):
            config = clip_config(77)
            config.hidden_size = config.projection_dim = width
            parts |= _numbered(number, clip_tokenizer(77), getattr(transformers, kind)(config))
        if model.t5:
            parts |= _numbered(len(model.clip), t5_tokenizer(), t5_encoder(model.t5))
    return parts


def _numbered(number, tokenizer, encoder):
    suffix = f"_{number + 1}" if number else ""
    return {f"tokenizer{suffix}": tokenizer, f"text_encoder{suffix}": encoder}
