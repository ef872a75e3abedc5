"""Tiny pipelines, which dry runs use too, under the name by which tests know them."""

from diffalign.policies.tiny import clip_config, clip_tokenizer, finish, t5_tokenizer, tiny_sd, tiny_sd3, vae

__all__ = ["clip_config", "clip_tokenizer", "finish", "t5_tokenizer", "tiny_sd", "tiny_sd3", "vae"]
