"""Tiny pipelines of the other families, as in `tiny`: real diffusers classes, random weights."""

from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKLQwenImage,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from diffalign.policies.tiny import (
    BETAS,
    DDIM,
    clip_config,
    clip_tokenizer,
    finish,
    t5_encoder,
    t5_tokenizer,
    tiny_sd,
    vae,
)

TRAILING = BETAS | {"timestep_spacing": "trailing", "set_alpha_to_one": False, "steps_offset": 1}


def tiny_sdxl(dtype: torch.dtype = torch.float32, *, scheduler: Any = None, **settings: Any) -> Any:
    """A StableDiffusionXLPipeline that draws 16 x 16 images from 4 x 8 x 8 latents."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=(1, 2),
        transformer_layers_per_block=(1, 1),
        use_linear_projection=True,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    )
    pipe = StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(clip_config()),
        text_encoder_2=CLIPTextModelWithProjection(clip_config()),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet,
        scheduler=scheduler or DDIMScheduler(**DDIM),
        add_watermarker=False,
        **settings,
    )
    return finish(pipe, dtype)


def tiny_sdxl_turbo(dtype: torch.dtype = torch.float32) -> Any:
    """SDXL with SDXL-Turbo's scheduler."""
    return tiny_sdxl(dtype, scheduler=EulerAncestralDiscreteScheduler.from_config(TRAILING))


def tiny_sd_turbo(dtype: torch.dtype = torch.float32) -> Any:
    """Stable Diffusion with SD-Turbo's scheduler."""
    pipe = tiny_sd(dtype)
    pipe.scheduler = EulerDiscreteScheduler.from_config(TRAILING)
    return pipe


def tiny_lcm(dtype: torch.dtype = torch.float32) -> Any:
    """A LatentConsistencyModelPipeline, whose UNet reads the guidance scale."""
    pipe = tiny_sd(dtype)
    torch.manual_seed(0)
    config = {key: value for key, value in pipe.unet.config.items() if not key.startswith("_")}
    unet = UNet2DConditionModel(**(config | {"time_cond_proj_dim": 16}))
    parts = {**pipe.components, "unet": unet, "scheduler": LCMScheduler(**BETAS)}
    return finish(LatentConsistencyModelPipeline(**parts, requires_safety_checker=False), dtype)


def tiny_flux(dtype: torch.dtype = torch.float32, *, guidance_embeds: bool = True) -> Any:
    """A FluxPipeline as FLUX.1-dev, or schnell: 16 x 16 images from 4 x 8 x 8 latents, 16 tokens."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 4, 8),
    )
    dev = {"shift": 3.0, "use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64}
    pipe = FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**(dev if guidance_embeds else {})),
        vae=vae(shift_factor=0.06),
        text_encoder=CLIPTextModel(clip_config()),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
    )
    return finish(pipe, dtype)


def tiny_schnell(dtype: torch.dtype = torch.float32) -> Any:
    """FLUX.1-schnell: no guidance embedding, no shift."""
    return tiny_flux(dtype, guidance_embeds=False)


def tiny_pixart_alpha(dtype: torch.dtype = torch.float32, *, sigma: bool = False, sample_size: int = 128) -> Any:
    """A PixArtAlphaPipeline, told the image's size where `sample_size` is the large model's, 128; or Sigma's."""
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        sample_size=sample_size,
        in_channels=4,
        out_channels=8,  # with a learned variance
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=16,
        patch_size=2,
    )
    pipe = (PixArtSigmaPipeline if sigma else PixArtAlphaPipeline)(
        transformer=transformer,
        scheduler=DDIMScheduler(beta_start=0.0001, beta_end=0.02, clip_sample=False),
        vae=vae(),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
    )
    return finish(pipe, dtype)


def tiny_pixart_sigma(dtype: torch.dtype = torch.float32) -> Any:
    """A PixArtSigmaPipeline."""
    return tiny_pixart_alpha(dtype, sigma=True, sample_size=8)


def tiny_sana(dtype: torch.dtype = torch.float32) -> Any:
    """A SanaPipeline, with another model's tokenizer."""
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=8,
        sample_size=8,
        timestep_scale=0.5,
    )
    encoder = Gemma2Config(
        vocab_size=40,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
    )
    decoder = AutoencoderDC(
        latent_channels=4,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        scaling_factor=0.8,
    )
    pipe = SanaPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=decoder,
        text_encoder=Gemma2Model(encoder),
        tokenizer=t5_tokenizer(),
    )
    return finish(pipe, dtype)


def tiny_qwen(dtype: torch.dtype = torch.float32) -> Any:
    """A QwenImagePipeline, with another model's tokenizer."""
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=8,
        axes_dims_rope=(4, 4, 8),
    )
    decoder = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.0, 0.8, 1.2, 0.9],
    )
    layers = {"intermediate_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    encoder = Qwen2_5_VLConfig(
        text_config=layers | {"num_key_value_heads": 1, "vocab_size": 40, "rope_parameters": rope},
        vision_config={"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": 8},
        image_token_id=39,
        video_token_id=38,
        vision_start_token_id=37,
        vision_end_token_id=36,
    )
    pipe = QwenImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64, shift_terminal=0.1
        ),
        vae=decoder,
        text_encoder=Qwen2_5_VLForConditionalGeneration(encoder),
        tokenizer=t5_tokenizer(),
    )
    return finish(pipe, dtype)
