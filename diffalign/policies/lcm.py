"""Latent consistency models: few steps, with the guidance scale embedded."""

from diffalign.policies.base import POLICIES
from diffalign.policies.sd import StableDiffusion


@POLICIES.register("lcm")
class LatentConsistency(StableDiffusion):
    """``LatentConsistencyModelPipeline`` (Luo et al. 2023, arXiv 2310.04378): a distilled UNet over LCM's timesteps.

    The pipeline predicts x_0 and adds fresh noise at every step but the last; here that is a law's business, and the
    schedule leads from each timestep to the next and to x_0. Stable Diffusion pipelines with an LCM LoRA and an
    LCMScheduler are read by the same tables.

    Departures from the pipeline: LCM's boundary condition, which mixes the state into x_0 by less than 1e-5 at any
    timestep that is accepted, is left out; no safety checker.
    """

    pipeline_class = "LatentConsistencyModelPipeline"
