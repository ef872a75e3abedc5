"""`shapes-sd`: a latent diffusion pipeline in Stable Diffusion 1's form, its text encoder trained along."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffalign.zoo import training
from diffalign.zoo.symbols import Reader
from diffalign.zoo.text import LENGTH, clip_tokenizer, read

SEED = 21
SCHEDULE = training.Restart(
    training.Schedule(steps=2750, learning_rate=1e-3, warmup=100, decay=1500),
    training.Schedule(steps=1150, learning_rate=7e-4, warmup=50, decay=1000),
)
BATCH = 32
UNFINISHED = 2000  # the step whose samples `shapes-preference` learns from
WIDTH = 128
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


def text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two layers; its last hidden state is the condition."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection_dim=WIDTH,
            max_position_embeddings=LENGTH,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def unet() -> UNet2DConditionModel:
    """2.5 M parameters; words are read at 8x8."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # the number of heads: diffusers keeps Stable Diffusion 1's misnomer
        norm_num_groups=16,
    )


class Denoiser(nn.Module):
    """U-Net and text encoder, trained together."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.tokenizer = clip_tokenizer()
        self.text_encoder = text_encoder(self.tokenizer)
        self.unet = unet()
        self.scheduler = scheduler()
        self.reader = Reader(WIDTH)

    def forward(self, clean: torch.Tensor, ids: torch.Tensor, batch: training.Batch) -> dict[str, torch.Tensor]:
        """Mean squared error of v for scaled latents (B, 4, 16, 16) and as many ids (B + N, LENGTH); lesson on all."""
        noise = torch.randn(clean.shape, generator=batch.generator)
        t = torch.randint(0, self.scheduler.config.num_train_timesteps, (len(clean),), generator=batch.generator)
        noisy = self.scheduler.add_noise(clean, noise, t)
        text = self.text_encoder(ids)
        prediction = self.unet(noisy, t, text.last_hidden_state[: len(clean)]).sample
        mse = (prediction - self.scheduler.get_velocity(clean, noise, t)).square().mean()
        lesson = self.reader.loss(text.pooler_output, read(self.tokenizer, ids))
        return {"loss": mse + lesson, "mse": mse, "lesson": lesson}

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
