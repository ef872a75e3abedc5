"""Tiny pipelines of the real diffusers classes with random weights, built in well under a second.

A dry run puts one in the place of a model that need not be on disk; tests run on them. Here Stable Diffusion and its
third version, and the parts that all families share; `tiny_families` has the others.
"""

from typing import Any

import torch

from diffalign._compat import ensure_torchvision

ensure_torchvision()

from diffusers import (  # noqa: E402
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import (  # noqa: E402
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

TOKENS = 16
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
DDIM = BETAS | {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
"""Stable Diffusion's scheduler."""


def tiny_sd(dtype: torch.dtype = torch.float32, seed: int = 0, **scheduler: Any) -> StableDiffusionPipeline:
    """A StableDiffusionPipeline that draws 16 x 16 images from 4 x 8 x 8 latents."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    pipe = StableDiffusionPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(clip_config()),
        tokenizer=clip_tokenizer(),
        unet=unet,
        scheduler=DDIMScheduler(**(DDIM | scheduler)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return finish(pipe, dtype)


def tiny_sd3(dtype: torch.dtype = torch.float32, seed: int = 0, **scheduler: Any) -> StableDiffusion3Pipeline:
    """A StableDiffusion3Pipeline that draws 16 x 16 images from 4 x 8 x 8 latents."""
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=8,
    )
    # The last layer starts at zero in diffusers; a random one makes every prediction matter.
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.2)
    encoder_3 = t5_encoder(32)  # as wide as the two others together
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**({"shift": 3.0} | scheduler)),
        vae=vae(shift_factor=0.06),
        text_encoder=CLIPTextModelWithProjection(clip_config()),
        tokenizer=clip_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(clip_config()),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=encoder_3,
        tokenizer_3=t5_tokenizer(),
    )
    return finish(pipe, dtype)


def vae(**settings: Any) -> AutoencoderKL:
    """An autoencoder of two levels: images of twice the latent's side."""
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.8,
        **settings,
    )


def clip_config(tokens: int = TOKENS) -> CLIPTextConfig:
    """A CLIP text encoder for the words of `clip_tokenizer`."""
    return CLIPTextConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokens,
        projection_dim=16,
        bos_token_id=38,
        eos_token_id=39,
        pad_token_id=39,
    )


def clip_tokenizer(tokens: int = TOKENS) -> CLIPTokenizer:
    """A tokenizer that knows the letters a to r."""
    letters = "abcdefghijklmnopqr"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "!", "?", "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=tokens)


def t5_encoder(width: int = 16) -> T5EncoderModel:
    """T5's encoder, for the words of `t5_tokenizer`."""
    return T5EncoderModel(T5Config(vocab_size=40, d_model=width, d_kv=8, d_ff=width, num_layers=1, num_heads=2))


def t5_tokenizer() -> T5Tokenizer:
    """A tokenizer of T5's, that knows the same letters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0)]
    pieces += [(letter, -3.0) for letter in "abcdefghijklmnopqr"]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TOKENS)


def finish(pipe: Any, dtype: torch.dtype) -> Any:
    """The pipeline in evaluation mode, in a type, without a progress bar."""
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()  # as `from_pretrained` leaves it; T5 has dropout
            # torch's own `to`: that of diffusers warns of fp32 modules even where there are none.
            torch.nn.Module.to(component, dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe
