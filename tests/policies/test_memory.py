"""What makes a policy smaller or faster at real size, and changes nothing that it does not say."""

import pytest
import torch
from diffusers import AutoencoderTiny

from diffalign.config import PipelineConfig
from diffalign.engine.load import load_policy
from diffalign.finetune import RewardBackprop
from diffalign.noise import normal
from diffalign.policies import Policy
from diffalign.policies.tiny import tiny_sd, tiny_sd3
from diffalign.policies.tiny_families import tiny_flux, tiny_pixart_alpha, tiny_qwen, tiny_sana

PROMPTS = ["a bad dog", "a lake"]


def latents(policy: Policy, side: int = 8) -> torch.Tensor:
    return normal((4, side, side), seed=0, purpose="initial", rows=[(i, 0) for i in range(2)])


def tiny_autoencoder(folder, channels: int = 4, levels: int = 2):
    torch.manual_seed(0)
    blocks = {"encoder_block_out_channels": (8,) * levels, "decoder_block_out_channels": (8,) * levels}
    numbers = {"num_encoder_blocks": (1,) * levels, "num_decoder_blocks": (1,) * levels}
    AutoencoderTiny(latent_channels=channels, **blocks, **numbers).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("build", [tiny_sd, tiny_sd3])
def test_a_tiny_decoder_decodes_where_there_is_a_gradient_and_only_there(build, tmp_path) -> None:
    policy = Policy.wrap(build())
    x = latents(policy)
    own = policy.decode(x)
    policy.set_tiny_decoder(tiny_autoencoder(tmp_path / "taesd"))
    assert torch.equal(policy.decode(x), own)
    x.requires_grad_()
    images = policy.decode(x)
    expected = policy.tiny_decoder.decode(x).sample * 0.5 + 0.5
    assert images.shape == own.shape
    assert torch.equal(images.detach(), expected.detach().clamp(0, 1))
    images.sum().backward()
    assert x.grad.abs().sum() > 0
    with torch.no_grad():
        assert torch.equal(policy.decode(x), own)


def test_a_tiny_decoder_of_other_latents_is_refused(tmp_path) -> None:
    policy = Policy.wrap(tiny_sd())
    with pytest.raises(ValueError, match=r"reads latents of 16 channels at 1/2 .* have 4 at 1/2"):
        policy.set_tiny_decoder(tiny_autoencoder(tmp_path / "sixteen", channels=16))
    with pytest.raises(ValueError, match=r"reads latents of 4 channels at 1/8"):
        policy.set_tiny_decoder(tiny_autoencoder(tmp_path / "eighth", levels=4))


def test_slices_and_tiles_of_the_vae_have_the_images_and_the_gradient() -> None:
    policy = Policy.wrap(tiny_sd())
    x = latents(policy, side=32).requires_grad_()
    policy.pipe.vae.tile_latent_min_size, policy.pipe.vae.tile_sample_min_size = 16, 32
    sizes: list[tuple] = []
    policy.pipe.vae.decoder.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape)))

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        sizes.clear()
        images = policy.decode(x)
        return images.detach(), torch.autograd.grad(images.square().sum(), x)[0]

    images, gradient = run()
    assert sizes == [(2, 4, 32, 32)]
    policy.pipe.vae.enable_slicing()
    sliced, its_gradient = run()
    assert sizes == [(1, 4, 32, 32)] * 2
    torch.testing.assert_close(sliced, images, rtol=0, atol=1e-5)
    torch.testing.assert_close(its_gradient, gradient, rtol=1e-3, atol=1e-5)
    policy.pipe.vae.enable_tiling()
    tiled, its_gradient = run()
    assert {size[-2:] for size in sizes} <= {(16, 16), (16, 8), (8, 16), (8, 8)}
    # Attention and normalisation see a tile each: near, not equal.
    assert 0 < (tiled - images).abs().mean() < 0.1
    cosine = torch.nn.functional.cosine_similarity(its_gradient.flatten(), gradient.flatten(), dim=0)
    assert cosine > 0.5


def test_offloaded_text_encoders_come_for_new_prompts_only() -> None:
    policy = Policy.wrap(tiny_sd3())
    expected = policy.encode(PROMPTS)
    policy.forget_prompts()
    moves: list[str] = []
    for encoder in policy.text_encoders:
        encoder.to = lambda device, encoder=encoder: moves.append(str(device))
    policy.place("cpu", offload_text_encoders=True)
    assert len(policy.text_encoders) == 3
    assert moves == []  # they stay in main memory
    found = policy.encode(PROMPTS)
    assert moves == ["cpu"] * 6  # three to the policy's device, three back
    for name, tensor in expected.tensors.items():
        assert torch.equal(found.tensors[name], tensor)
    policy.encode(PROMPTS[::-1])
    assert len(moves) == 6
    policy.unconditional(2)
    assert len(moves) > 6


@pytest.mark.parametrize("build", [tiny_sd, tiny_sd3, tiny_flux, tiny_sana, tiny_qwen, tiny_pixart_alpha])
def test_offloaded_blocks_predict_and_train_the_same(build) -> None:
    def run(offload: bool) -> tuple[Policy, torch.Tensor, dict[str, torch.Tensor]]:
        policy = Policy.wrap(build())
        policy.place("cpu", offload_blocks=offload)
        policy.add_lora(rank=2, alpha=2)
        policy.set_gradient_checkpointing(True)
        shape = policy.latent_shape(16, 16)
        x = normal(shape, seed=0, purpose="initial", rows=[(i, 0) for i in range(2)])
        condition = policy.encode(PROMPTS)
        output = policy.predict(x, policy.schedule(4, 16, 16).level(1).expand(2), condition, 1.0).output
        output.square().sum().backward()
        return policy, output.detach(), {n: p.grad for n, p in policy.trainable().items() if p.grad is not None}

    _, expected, gradient = run(False)
    policy, output, its_gradient = run(True)
    assert torch.equal(output, expected)
    assert its_gradient.keys() == gradient.keys()
    for name, grad in gradient.items():
        assert torch.equal(its_gradient[name], grad), name
    adapter = set(policy.trainable().values())
    frozen = [p for block in policy.blocks for p in block.parameters() if p not in adapter]
    assert not any(p.is_meta for p in adapter)
    assert sum(p.numel() for p in frozen if p.is_meta) > 0.7 * sum(p.numel() for p in frozen)
    with pytest.raises(ValueError, match="offload_blocks needs gradient_checkpointing=block"):
        policy.set_gradient_checkpointing(False)
    with pytest.raises(ValueError, match="leave out offload_blocks"):
        policy.shard_blocks()


# torch's tracer looks at .grad of every input.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("build", [tiny_sd, tiny_sd3, tiny_flux])
def test_compiled_blocks_predict_the_same_with_the_same_gradient(build) -> None:
    policy = Policy.wrap(build())
    policy.add_lora(rank=2, alpha=2)
    x = normal(policy.latent_shape(16, 16), seed=0, purpose="initial", rows=[(i, 0) for i in range(2)])
    level, condition = policy.schedule(4, 16, 16).level(1).expand(2), policy.encode(PROMPTS)

    def run() -> tuple[torch.Tensor, list[torch.Tensor]]:
        output = policy.predict(x, level, condition, 3.0).output
        grads = torch.autograd.grad(output.square().sum(), list(policy.trainable().values()), allow_unused=True)
        return output.detach(), [g for g in grads if g is not None]

    output, gradient = run()
    calls: list[int] = []

    def backend(graph, inputs):
        calls.append(len(inputs))
        return graph.forward

    policy.compile_blocks(backend=backend)
    compiled, its_gradient = run()
    assert calls, "no block was compiled"
    torch.testing.assert_close(compiled, output, rtol=1e-5, atol=1e-6)
    for a, b in zip(its_gradient, gradient, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torch's own import
def test_a_recipe_asks_for_it(tmp_path) -> None:
    asked = {"offload_text_encoders": True, "vae_slicing": True, "vae_tiling": True, "compile": True}
    decoder = tiny_autoencoder(tmp_path / "taesd", levels=3)
    policy = load_policy(PipelineConfig(path="zoo:shapes-sd", tiny_decoder=str(decoder), **asked))
    assert policy.pipe.vae.use_slicing
    assert policy.pipe.vae.use_tiling
    assert policy.tiny_decoder.config.latent_channels == 4
    compiled = [type(m).__name__ for m in policy.denoiser.modules() if m._compiled_call_impl is not None]
    assert set(compiled) == {"BasicTransformerBlock"}
    assert policy.encode(PROMPTS).device == policy.device


def test_8_bit_adam_without_a_gpu_is_refused() -> None:
    policy = Policy.wrap(tiny_sd())
    with pytest.raises(ValueError, match="adamw_8bit needs a GPU, and the adapter is on cpu: use adamw"):
        RewardBackprop(policy, lambda images, prompts, metadata: images.mean((1, 2, 3)), optimizer="adamw_8bit")
