"""`shapes-sd`: a latent diffusion pipeline in Stable Diffusion 1's form."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel

from diffalign.zoo import reading, training
from diffalign.zoo.text import WIDTH, clip_tokenizer, text_config

SEED = 21
SCHEDULE = training.Schedule(steps=3000, learning_rate=1e-3, warmup=100, decay=1000)
BATCH = 32
UNFINISHED = 2000  # the step whose samples `shapes-preference` learns from
SHIFTED = False  # the pipeline divides latents by the scaling factor and adds no shift


def scheduler() -> DDIMScheduler:
    """v-prediction on Stable Diffusion's own noise table; trailing steps, so that 20 of them start at pure noise."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def unet() -> UNet2DConditionModel:
    """3.6 M parameters; words are read at 8x8 and at 4x4, where zero padding tells every pixel where it is."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 96, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # the number of heads: diffusers keeps Stable Diffusion 1's misnomer
        norm_num_groups=16,
    )


class Denoiser(nn.Module):
    """U-Net, and a text encoder that learns first and is frozen then."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.tokenizer = clip_tokenizer()
        self.text_encoder = CLIPTextModel(text_config(self.tokenizer))
        self.unet = unet()
        self.scheduler = scheduler()

    def learn_to_read(self, folder: Path) -> float:
        """Train the text encoder alone; returns the seconds."""
        return reading.teach(self.text_encoder, reading.states(self.text_encoder), self.tokenizer, folder, SEED)

    def forward(self, clean: torch.Tensor, ids: torch.Tensor, batch: training.Batch) -> dict[str, torch.Tensor]:
        """Mean squared error of v for scaled latents (B, 4, 16, 16) and ids (B, LENGTH)."""
        noise = torch.randn(clean.shape, generator=batch.generator)
        t = torch.randint(0, self.scheduler.config.num_train_timesteps, (len(clean),), generator=batch.generator)
        noisy = self.scheduler.add_noise(clean, noise, t)
        prediction = self.unet(noisy, t, self.text_encoder(ids).last_hidden_state).sample
        return {"loss": (prediction - self.scheduler.get_velocity(clean, noise, t)).square().mean()}

    def pipeline(self, vae: AutoencoderKL) -> StableDiffusionPipeline:
        """The pipeline of these weights; it shares them."""
        return StableDiffusionPipeline(
            vae=vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
