"""Tiny pipelines of the other families, likewise."""

from diffalign.policies.tiny_families import (
    BETAS,
    TRAILING,
    tiny_flux,
    tiny_lcm,
    tiny_pixart_alpha,
    tiny_pixart_sigma,
    tiny_qwen,
    tiny_sana,
    tiny_schnell,
    tiny_sd_turbo,
    tiny_sdxl,
    tiny_sdxl_turbo,
)

__all__ = [
    "BETAS",
    "TRAILING",
    "tiny_flux",
    "tiny_lcm",
    "tiny_pixart_alpha",
    "tiny_pixart_sigma",
    "tiny_qwen",
    "tiny_sana",
    "tiny_schnell",
    "tiny_sd_turbo",
    "tiny_sdxl",
    "tiny_sdxl_turbo",
]
