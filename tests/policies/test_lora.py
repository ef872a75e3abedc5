"""LoRA: diffusers loads what was saved and draws the same images; what does not fit is refused in words."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffalign.noise import normal
from diffalign.policies import Policy
from diffalign.policies.tiny import tiny_sd, tiny_sd3

BUILDS = [tiny_sd, tiny_sd3]
FILE = "pytorch_lora_weights.safetensors"


def tuned(build, **settings) -> Policy:
    policy = Policy.wrap(build())
    policy.add_lora(**({"rank": 2, "alpha": 3} | settings))
    random = torch.Generator().manual_seed(0)
    for parameter in policy.trainable().values():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=random))
    return policy


def images(pipe) -> torch.Tensor:
    noise = normal((4, 8, 8), seed=0, purpose="initial", rows=[(0, 0)])
    call = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "pt", "latents": noise}
    return pipe(["a bad dog"], **call).images


@pytest.mark.parametrize("build", BUILDS)
def test_plain_diffusers_draws_the_same_images_from_the_saved_lora(build, tmp_path) -> None:
    policy = tuned(build)
    base = images(build())
    mine = images(policy.pipe)
    assert (mine - base).abs().max() > 0.01, "the user's own pipeline is tuned"
    assert policy.save_lora(tmp_path) == tmp_path / FILE
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    pipe = build()
    pipe.load_lora_weights(tmp_path)
    assert torch.equal(images(pipe), mine)
    again = Policy.wrap(build())
    again.load_lora(tmp_path)
    assert torch.equal(images(again.pipe), mine)
    assert all(torch.equal(p, again.trainable()[n]) for n, p in policy.trainable().items())
    first = load_file(tmp_path / FILE)
    again.save_lora(tmp_path)
    second = load_file(tmp_path / FILE)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("build", BUILDS)
def test_an_existing_lora_is_copied_into_the_adapters_own_tensors(build, tmp_path) -> None:
    old = tuned(build)
    old.save_lora(tmp_path)
    policy = Policy.wrap(build())
    policy.add_lora(rank=2, alpha=3)
    before = policy.trainable()
    policy.load_lora(tmp_path / FILE)
    after = policy.trainable()
    assert before.keys() == after.keys() == old.trainable().keys()
    assert all(after[n] is before[n] for n in after), "an optimiser would hold other tensors"
    assert all(torch.equal(after[n], p) for n, p in old.trainable().items())
    assert torch.equal(images(policy.pipe), images(old.pipe))


def test_a_lora_that_the_pipeline_already_carries_is_adopted(tmp_path) -> None:
    tuned(tiny_sd).save_lora(tmp_path)
    pipe = tiny_sd()
    pipe.load_lora_weights(tmp_path, adapter_name="style")
    expected = images(pipe)
    policy = Policy.wrap(pipe)
    assert policy.adapter_name == "style"
    assert len(policy.trainable()) == 64
    assert torch.equal(images(pipe), expected)
    with pytest.raises(ValueError, match="already has adapter 'style'"):
        policy.add_lora(rank=2, alpha=2)
    policy.save_lora(tmp_path / "again")
    assert load_file(tmp_path / "again" / FILE).keys() == load_file(tmp_path / FILE).keys()


def test_the_start_is_the_same_everywhere_and_the_identity() -> None:
    """A has standard deviation 1 / rank and depends on seed and name alone; B is 0."""
    torch.manual_seed(1)
    one = Policy.wrap(tiny_sd())
    one.add_lora(rank=8, alpha=8, seed=5)
    torch.manual_seed(2)
    two = Policy.wrap(tiny_sd())
    two.add_lora(rank=8, alpha=8, seed=5)
    values = []
    for name, parameter in one.trainable().items():
        assert torch.equal(parameter, two.trainable()[name])
        if "lora_B" in name:
            assert not parameter.any()
        else:
            values.append(parameter.detach().flatten())
    assert abs(torch.cat(values).std().item() - 1 / 8) < 0.005


def test_layers_can_be_named() -> None:
    policy = Policy.wrap(tiny_sd3())
    policy.add_lora(rank=2, alpha=2, target_modules=["to_q"])
    assert all(".to_q." in name for name in policy.trainable())
    with pytest.raises(ValueError, match="target_modules 'everything' is unknown"):
        Policy.wrap(tiny_sd3()).add_lora(rank=2, alpha=2, target_modules="everything")


def test_files_that_are_no_lora_of_this_model_are_refused_in_words(tmp_path) -> None:
    tuned(tiny_sd).save_lora(tmp_path / "sd")
    tuned(tiny_sd, rank=4).save_lora(tmp_path / "rank4")
    weights = load_file(tmp_path / "sd" / FILE)
    save_file({k.replace("attn1", "attn9"): v for k, v in weights.items()}, tmp_path / "layers.safetensors")
    save_file({k: v.repeat(1, 2) if "lora_A" in k else v for k, v in weights.items()}, tmp_path / "wide.safetensors")
    extra = {f"text_encoder.{k.removeprefix('unet.')}": v.clone() for k, v in weights.items()}
    save_file(weights | extra, tmp_path / "text.safetensors")

    policy = Policy.wrap(tiny_sd())
    with pytest.raises(FileNotFoundError, match=r"no LoRA at .*nowhere: give a folder with pytorch_lora_weights"):
        policy.load_lora(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"only the unet is trained here: call pipe\.load_lora_weights, pipe\.fuse"):
        policy.load_lora(tmp_path / "text.safetensors")
    for name in ("layers.safetensors", "wide.safetensors"):
        with pytest.raises(ValueError, match=rf"{name} is not a LoRA of this unet"):
            policy.load_lora(tmp_path / name)
        assert policy.adapter_name is None
    with pytest.raises(ValueError, match=r"no LoRA of a transformer: its keys are like 'unet\..*expected 'transformer"):
        Policy.wrap(tiny_sd3()).load_lora(tmp_path / "sd")
    # After all that the policy still takes a right one, and one of another rank is refused beside it.
    policy.load_lora(tmp_path / "sd")
    kept = {n: p.detach().clone() for n, p in policy.trainable().items()}
    with pytest.raises(ValueError, match="it has rank 4, alpha 3 and 64 tensors, unlike the present adapter"):
        policy.load_lora(tmp_path / "rank4")
    assert policy.adapter_name == "default"
    assert all(torch.equal(p, kept[n]) for n, p in policy.trainable().items())


def test_without_an_adapter_there_is_no_reference_and_nothing_to_save(tmp_path) -> None:
    policy = Policy.wrap(tiny_sd())
    with pytest.raises(ValueError, match="no adapter, so it has no reference: call add_lora first"), policy.reference():
        pass
    with pytest.raises(ValueError, match="no adapter to save"):
        policy.save_lora(tmp_path)


def test_a_reference_inside_another_ends_with_the_outer_one() -> None:
    policy = tuned(tiny_sd)
    own = images(policy.pipe)
    with policy.reference():
        base = images(policy.pipe)
        with policy.reference():
            assert torch.equal(images(policy.pipe), base)
        assert torch.equal(images(policy.pipe), base)
    assert torch.equal(images(policy.pipe), own)
    assert not torch.equal(own, base)
    assert all(parameter.requires_grad for parameter in policy.trainable().values())
