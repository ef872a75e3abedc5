"""What the families over betas share, and those over a rectified flow."""

from torch import Tensor

from diffalign.laws import PredictionKind, Schedule
from diffalign.policies.base import Policy
from diffalign.policies.decoding import unscaled
from diffalign.policies.tables import as_flow_euler, check_diffusion, read_diffusion, read_flow


class DiffusionPolicy(Policy):
    """A denoiser over DDIM's tables."""

    def check(self) -> None:
        """Refuse schedulers without tables."""
        check_diffusion(self.pipe.scheduler)

    def schedule(self, num_inference_steps: int, height: int | None = None, width: int | None = None) -> Schedule:
        """Return the levels; they do not depend on the image size."""
        return read_diffusion(self.pipe.scheduler, num_inference_steps)

    def prediction_kind(self) -> PredictionKind:
        """Return the scheduler's prediction type."""
        return self.pipe.scheduler.config.get("prediction_type", "epsilon")

    def unscale(self, latents: Tensor) -> Tensor:
        """Divide by the VAE's scaling factor."""
        return latents / self.pipe.vae.config.scaling_factor


class FlowPolicy(Policy):
    """A transformer that predicts the velocity of a rectified flow."""

    denoiser_name = "transformer"

    def check(self) -> None:
        """Refuse schedulers that cannot be read."""
        as_flow_euler(self.pipe.scheduler)

    def schedule(self, num_inference_steps: int, height: int | None = None, width: int | None = None) -> Schedule:
        """Return the sigmas, shifted as the scheduler says; they do not depend on the image size."""
        return read_flow(self.pipe.scheduler, num_inference_steps, None)

    def prediction_kind(self) -> PredictionKind:
        """Return "velocity"."""
        return "velocity"

    def unscale(self, latents: Tensor) -> Tensor:
        """Undo the VAE's scale and, where its config has one, its shift."""
        return unscaled(latents, self.pipe.vae.config)
