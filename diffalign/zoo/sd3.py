"""`shapes-sd3`: a rectified-flow transformer pipeline in Stable Diffusion 3's form."""

import math
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5Tokenizer

from diffalign.zoo import reading, training
from diffalign.zoo.text import WIDTH, clip_tokenizer, t5_tokenizer, text_config

SEED = 31
SCHEDULE = training.Restarts(
    (
        training.Schedule(steps=4800, learning_rate=1e-3, warmup=100, decay=2400),
        training.Schedule(steps=1500, learning_rate=8e-4, warmup=50, decay=1400),
        training.Schedule(steps=2000, learning_rate=8e-4, warmup=50, decay=1700),
    )
)
BATCH = 32
UNFINISHED = 2500  # the step whose samples `shapes-preference` learns from
SHIFTED = True  # the pipeline adds the shift factor before it decodes
T5_LENGTHS = (16, 256)
"""`max_sequence_length` that training covers: short and fast, up to the pipeline's default."""


def silent_t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """A T5 that answers zeros, as the pipeline itself does in place of a T5 that is None.

    Plain `from_pretrained` wants the component. All its weights are zero.
    """
    t5 = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=2 * WIDTH, d_kv=1, d_ff=1, num_layers=1, num_heads=1)
    )
    for parameter in t5.parameters():
        nn.init.zeros_(parameter)
    return t5


def transformer() -> SD3Transformer2DModel:
    """3.5 M parameters: six joint blocks of width 128 on 8x8 patches."""
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=128,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=8,
    )


class WeightedJointAttention:
    """Joint attention where the last context token stands for `copies` (B,) equal ones, at the cost of one.

    Equal keys add up in the softmax, so n copies are one key whose logit is raised by log n. The T5's tokens are
    equal, and stay so in every block (the context has no positions): training this way is exactly, not nearly, the
    pipeline's computation with `max_sequence_length = n`, 3.5 times faster at the default n = 256.
    """

    copies: torch.Tensor

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend over image tokens (B, N, C) and context tokens (B, M, C) together; returns both."""

        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        pixels = [heads(layer(hidden_states)) for layer in (attn.to_q, attn.to_k, attn.to_v)]
        added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        context = [heads(layer(encoder_hidden_states)) for layer in added]
        query, key, value = (torch.cat(parts, dim=2) for parts in zip(pixels, context, strict=True))
        bias = query.new_zeros(len(query), 1, 1, key.shape[2])
        bias[:, 0, 0, -1] = self.copies.log()
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2).flatten(2)
        image, text = mixed.split((hidden_states.shape[1], encoder_hidden_states.shape[1]), dim=1)
        return attn.to_out[0](image), text if attn.context_pre_only else attn.to_add_out(text)


def random_copies(count: int, generator: torch.Generator) -> torch.Tensor:
    """Lengths of the T5's tokens (count,) that training attends to, over all that it covers."""
    low, high = (math.log(n) for n in T5_LENGTHS)
    spread = torch.rand(count, generator=generator) * 2 - 1  # half of all rows at the short end
    return torch.exp(low + spread.clamp(0, 1) * (high - low)).round()


def _read(encoder: CLIPTextModelWithProjection, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the pipeline takes of a CLIP encoder: words from the last layer but one, and the projected caption."""
    output = encoder(ids, output_hidden_states=True)
    return output.hidden_states[-2], output.text_embeds


class Denoiser(nn.Module):
    """Transformer, and two CLIP encoders that learn first and are frozen then."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.tokenizer = clip_tokenizer()
        self.text_encoder = CLIPTextModelWithProjection(text_config(self.tokenizer))
        self.text_encoder_2 = CLIPTextModelWithProjection(text_config(self.tokenizer))
        self.transformer = transformer()
        self.attention = WeightedJointAttention()

    def learn_to_read(self, folder: Path) -> float:
        """Train the text encoders alone, one after the other; returns the seconds."""
        return sum(
            reading.teach(encoder, partial(_read, encoder), self.tokenizer, folder / f"{i}", SEED + i)
            for i, encoder in enumerate((self.text_encoder, self.text_encoder_2))
        )

    def encode(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Context (B, LENGTH + 1, 256), its last token for all of T5's, and pooled (B, 256), as the pipeline does."""
        words, pooled = zip(*(_read(encoder, ids) for encoder in (self.text_encoder, self.text_encoder_2)), strict=True)
        return F.pad(torch.cat(words, dim=-1), (0, 0, 0, 1)), torch.cat(pooled, dim=-1)

    def forward(self, clean: torch.Tensor, ids: torch.Tensor, batch: training.Batch) -> dict[str, torch.Tensor]:
        """Mean squared error of velocity for scaled latents (B, 4, 16, 16) and ids (B, LENGTH)."""
        generator = batch.generator
        noise = torch.randn(clean.shape, generator=generator)
        sigma = compute_density_for_timestep_sampling(
            "logit_normal", len(clean), logit_mean=0.0, logit_std=1.0, generator=generator
        )
        self.attention.copies = random_copies(len(clean), generator)
        context, pooled = self.encode(ids)
        s = sigma[:, None, None, None]
        prediction = self.transformer(
            hidden_states=(1 - s) * clean + s * noise,
            timestep=sigma * 1000,
            encoder_hidden_states=context,
            pooled_projections=pooled,
        ).sample
        return {"loss": (prediction - (noise - clean)).square().mean()}

    def train(self, mode: bool = True) -> "Denoiser":
        """Training attends with weights; evaluation is the pipeline's own code."""
        super().train(mode)
        if mode:
            self.transformer.set_attn_processor(self.attention)
        else:
            self.transformer.set_attn_processor(JointAttnProcessor2_0())
        return self

    def pipeline(self, vae: AutoencoderKL) -> StableDiffusion3Pipeline:
        """The pipeline of these weights; it shares them."""
        t5 = t5_tokenizer()
        return StableDiffusion3Pipeline(
            transformer=self.transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
            vae=vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            text_encoder_2=self.text_encoder_2,
            tokenizer_2=self.tokenizer,
            text_encoder_3=silent_t5(t5),
            tokenizer_3=t5,
        )
