"""One contract for every family. `python -m tests.policies.test_contract` prints what was measured as a table."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import Tensor

from diffalign.policies import POLICIES, Policy
from diffalign.rollout import log_probs, transition
from tests.contract_table import print_table
from tests.policies.contract import FAMILIES, PROMPTS, Family, Run, differentiate, drawn, noise, pixels, relative

# diffusers' EulerAncestral with numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def parity(family: Family) -> str:
    """From the same noise the policy ends at the pipeline's own latents."""
    return _parity(family, family.square)


def non_square(family: Family) -> str:
    """The same for an image that is wider than high."""
    return _parity(family, family.wide)


def _parity(family: Family, size: tuple[int, int]) -> str:
    worst = 0.0
    for guidance in family.guidance:
        pipe = family.build()
        expected = drawn(pipe, family, guidance, size)
        found = Run.of(family, pipe, size).rollout(family.own, guidance).latents
        worst = max(worst, relative(found, expected))
    assert worst < family.bound, worst
    return f"{worst:.0e}"


def decoding(family: Family) -> str:
    """The latents of a rollout are decoded to the pipeline's own pixels."""
    pipe = family.build()
    run = Run.of(family, pipe)
    run.schedule = run.policy.schedule(2, *family.square)
    with torch.no_grad():
        images = run.policy.decode(run.rollout(family.own).latents)
    distance = (images - pixels(pipe, family)).abs().max().item()
    assert images.std() > 1e-3
    assert distance < 1e-5, distance
    return f"{distance:.0e}"


def ratio(family: Family) -> str:
    """Right after sampling the ratio is exactly 1; after the weights moved it is not."""
    run = Run.of(family, family.build(), lora=True)
    record = {"record_states": True, "record_transitions": True, "record_log_probs": "sum"}
    taken = run.rollout(family.sde, **record)
    chain = {"law": family.sde, "schedule": run.schedule, "guidance_scale": family.guidance[0]}
    steps = taken.stochastic.nonzero().flatten().tolist()
    with torch.no_grad():
        again = log_probs(run.policy, taken, run.condition, reduction="sum", **chain)
        assert torch.equal(again, taken.log_probs[:, steps])
        for parameter in run.policy.trainable().values():
            parameter.mul_(1.5)
        moved = transition(run.policy, taken, run.condition, step=steps[0], **chain)
    log_ratio = moved.log_ratio(taken.states[steps[0] + 1], taken.transitions[steps[0]], "mean")
    assert (log_ratio.exp() - 1).abs().min() > 1e-6
    return f"exactly 1 ({len(steps)} steps)"


def lora_round_trip(family: Family) -> str:
    """The saved file gives a fresh pipeline the tuned images, bit for bit."""
    tuned, fresh = Run.of(family, family.build(), lora=True), family.build()
    mine = pixels(tuned.policy.pipe, family)
    assert (mine - pixels(fresh, family)).abs().max() > 1e-3
    with TemporaryDirectory() as folder:
        file = tuned.policy.save_lora(Path(folder))
        if family.plain_lora:
            fresh.load_lora_weights(folder, weight_name=file.name)
        else:
            Policy.wrap(fresh).load_lora(file)
    assert torch.equal(pixels(fresh, family), mine)
    return "bit-equal" if family.plain_lora else "bit-equal, by Policy.load_lora (diffusers has no loader)"


def prompts_cached(family: Family) -> str:
    """Each distinct prompt passes each text encoder once, and rows are those of a fresh encoding."""
    policy = Policy.wrap(family.build())
    calls = {name: 0 for name, part in policy.pipe.components.items() if name.startswith("text_encoder") and part}
    for name in calls:
        tick = lambda *_, name=name: calls.__setitem__(name, calls[name] + 1)  # noqa: E731
        getattr(policy.pipe, name).register_forward_hook(tick)
    first = policy.encode([PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    again = policy.encode(PROMPTS[::-1])
    assert set(calls.values()) == {2}, calls
    fresh = Policy.wrap(family.build()).encode(PROMPTS)
    assert first.tensors.keys() == fresh.tensors.keys()
    for name, tensor in fresh.tensors.items():
        assert torch.equal(first.tensors[name], tensor[[0, 1, 0]])
        assert torch.equal(again.tensors[name], tensor[[1, 0]])
        assert not tensor.requires_grad
    assert any((tensor[0] != tensor[1]).any() for tensor in fresh.tensors.values())
    return f"bit-equal ({len(fresh.tensors)} tensors)"


def bf16(family: Family) -> str:
    """A bf16 pipeline keeps states and adapters in fp32, stays near the fp32 images, and has finite gradients."""
    run = Run.short(family, family.build(torch.bfloat16))
    assert {p.dtype for p in run.policy.trainable().values()} == {torch.float32}
    taken = run.rollout(family.own)
    assert taken.latents.dtype == torch.float32
    exact = Run.short(family, family.build()).rollout(family.own).latents
    distance = ((taken.latents - exact).norm() / exact.norm()).item()
    assert distance < 0.1, distance
    gradients = differentiate(run.reward(), list(run.policy.trainable().values()))
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in gradients)
    return f"{distance:.1%} from fp32"


def reward_gradient(family: Family) -> str:
    """The gradient of the pixels reaches every tensor of the adapter; that of the latents agrees with differences."""
    run = Run.short(family, family.build())
    names, parameters = zip(*run.policy.trainable().items(), strict=True)
    reached = differentiate(run.reward(), parameters)
    idle = [n for n in names if any(layer in n for layer in family.idle)]
    assert [n for n, g in zip(names, reached, strict=True) if not g.any()] == idle
    run = Run.short(family, family.build(torch.float64))
    parameters = list(run.policy.trainable().values())
    gradients = differentiate(run.graded().square().sum(), parameters)
    length = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
    values, step = [], 1e-3
    with torch.no_grad():
        for sign in (1, -2):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.add_(gradient, alpha=sign * step / length)
            values.append(run.rollout(family.own).latents.square().sum().item())
    error = abs((values[0] - values[1]) / (2 * step * length) - 1)
    assert error < 0.01, error
    return f"{sum(bool(g.any()) for g in reached)} of {len(reached)} tensors; differences {error:.0e}"


def rows_apart(family: Family) -> str:
    """Rows of a batch may stand at different times."""
    run = Run.of(family, family.build())
    schedule = run.policy.schedule(3, *family.square)
    x, scale = noise(run.policy, family.square), family.guidance[0]
    with torch.no_grad():
        together = run.policy.predict(x, schedule.level(torch.tensor([0, 2])), run.condition, scale).output
        for row, i in enumerate((0, 2)):
            index = slice(row, row + 1)
            alone = run.policy.predict(x[index], schedule.level(i), run.condition.rows(index), scale).output
            error = relative(together[index], alone)
            assert error < 1e-5, error
    return f"{error:.0e}"


def checkpointing(family: Family) -> str:
    """Gradient checkpointing stores less and changes no gradient."""
    run = Run.short(family, family.build())
    parameters = list(run.policy.trainable().values())
    stored = {}

    def gradients(enabled: bool) -> list[Tensor]:
        stored[enabled] = 0

        def pack(tensor: Tensor) -> Tensor:
            stored[enabled] += tensor.nbytes
            return tensor

        run.policy.set_gradient_checkpointing(enabled)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            reward = run.reward()
        return differentiate(reward, parameters)

    plain, saved = gradients(False), gradients(True)
    worst = max(relative(one, other) for one, other in zip(saved, plain, strict=True) if other.any())
    assert worst < 1e-4, worst
    share = stored[True] / stored[False]
    assert share < 0.85, share
    return f"equal to {worst:.0e}, stores {share:.0%}"


PROPERTIES: dict[str, Callable[[Family], str]] = {
    "zero-noise parity": parity,
    "non-square parity": non_square,
    "decoding": decoding,
    "ratio 1": ratio,
    "LoRA round trip": lora_round_trip,
    "rows apart": rows_apart,
    "prompts cached": prompts_cached,
    "bf16": bf16,
    "reward gradient": reward_gradient,
    "checkpointing": checkpointing,
}


@pytest.mark.parametrize("name", PROPERTIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_every_promise(family: str, name: str) -> None:
    print(PROPERTIES[name](FAMILIES[family]))


def test_no_family_is_left_out() -> None:
    driven = {type(Policy.wrap(family.build())) for family in FAMILIES.values()}
    assert driven == {POLICIES.get(name) for name in POLICIES.names()}


def main() -> None:
    """Print the contract's table in Markdown."""
    print_table("family", FAMILIES, PROPERTIES)


if __name__ == "__main__":
    main()
