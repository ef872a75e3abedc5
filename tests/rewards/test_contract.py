"""One contract for every scorer. `python -m tests.rewards.test_contract` prints what was measured as a table."""

import functools
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import nn

from diffalign import media, rewards
from diffalign.rewards import Reward, Score, check_gradient
from tests.contract_table import print_table
from tests.rewards.contract import SCORERS, samples

LONG = "a big red circle above the square " * 60
_folders = tempfile.TemporaryDirectory(prefix="contract-")


@functools.cache
def built(name: str) -> Reward:
    """One of each, as the files take longest."""
    folder = Path(_folders.name, name.replace("/", "-"))
    folder.mkdir()
    torch.manual_seed(0)
    return SCORERS[name].build(folder)


def scores(name: str, given: torch.Tensor, prompts: Sequence[str] | None = None) -> Score:
    """Of the samples, with what the scorer needs of their metadata."""
    asked = SCORERS[name].prompts if prompts is None else prompts
    return built(name)(given, asked, [SCORERS[name].metadata] * len(asked))


def layout(name: str) -> str:
    """It loads from files under the published names."""
    assert built(name).name
    return SCORERS[name].layout or "no weights"


def batch(name: str) -> str:
    """A score is that of the sample alone, whatever is beside it."""
    reward, prompts = built(name), SCORERS[name].prompts
    given = samples(reward)
    together = scores(name, given)
    alone = torch.cat([scores(name, given[i : i + 1], [prompts[i]]).value for i in range(3)])
    backwards = scores(name, given.flip(0), prompts[::-1]).value.flip(0)
    worst = max(float((other - together.value).abs().max()) for other in (alone, backwards))
    spread = float(together.value.max() - together.value.min())
    assert together.valid.all()
    assert worst <= 1e-4 * max(1.0, spread), worst
    return f"{worst:.0e}"


def saved(name: str) -> str:
    """A float tensor scores as the file that it is saved to."""
    reward = built(name)
    generator = torch.Generator().manual_seed(1)
    floats = (samples(reward) + 0.002 * torch.rand(samples(reward).shape, generator=generator)).clamp(0, 1)
    if reward.media == "video" or not SCORERS[name].rounds:
        pixels = media.from_uint8(media.to_uint8(floats))
        difference = float((scores(name, floats).value - scores(name, pixels).value).abs().max())
        assert difference < 5e-3, difference
        return f"{difference:.0e}, {'frames' if reward.media == 'video' else 'pixels'} as given"
    files = [Path(_folders.name, f"{i}.png") for i in range(3)]
    for image, file in zip(floats, files, strict=True):
        media.save_png(image, file)
    opened = media.from_pil([media.open_image(file) for file in files])
    assert torch.equal(scores(name, floats).value, scores(name, opened).value)
    return "equal"


def gradient(name: str) -> str:
    """Its gradient is that of the same arithmetic without rounding to 8 bits, by finite differences in float64."""
    scorer, reward = SCORERS[name], built(name)
    if not reward.differentiable:
        with torch.enable_grad():
            score = scores(name, samples(reward).requires_grad_())
        assert not score.value.requires_grad
        return "declared absent"
    check_gradient(reward, samples(reward), scorer.prompts, [scorer.metadata] * 3)
    folder = Path(_folders.name, f"double-{name.replace('/', '-')}")
    folder.mkdir()
    torch.manual_seed(0)
    own = scorer.build(folder)
    with without_rounding():
        to_double(own)
        noise = torch.rand(samples(own).shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        images = samples(own).double() * 0.8 + 0.1 + 0.05 * noise  # plain areas are full of ties
        leaf = images.clone().requires_grad_()

        def total(pixels: torch.Tensor) -> torch.Tensor:
            return own(pixels, scorer.prompts, [scorer.metadata] * 3).value.sum()

        total(leaf).backward()
        worst = 0.0
        for seed in range(2):
            direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            ahead, behind = (total(images + h * direction).detach() for h in (scorer.step, -scorer.step))
            found, expected = float((leaf.grad * direction).sum()), float(ahead - behind) / (2 * scorer.step)
            worst = max(worst, abs(found - expected) / float(leaf.grad.norm()))
    assert leaf.grad.abs().sum() > 0
    assert worst < scorer.bound, worst
    return f"{worst:.0e}"


@contextmanager
def without_rounding() -> Iterator[None]:
    """Pixels stay real numbers, and what is computed in float32 is computed in float64."""
    smooth = functools.partial(media.resize, rounding=False)

    def resize(images: torch.Tensor, size: tuple[int, int], filter: str = "bicubic", **_: bool) -> torch.Tensor:
        return smooth(images, size, filter)

    with (
        patch("diffalign.rewards.preprocessing.resize", resize),
        patch("diffalign.rewards.vlm.qwen_patches.resize", resize),
        patch("diffalign.rewards.vlm.qwen_patches.quantise", lambda images: images, create=True),
        patch("diffalign.rewards.hps.quantise", lambda images: images),
        patch("diffalign.rewards.qwen_rewards.video_reward.quantise", lambda images: images),
        patch("diffalign.rewards.qwen_rewards.video_reward.resize", resize),
        patch("diffalign.rewards.qwen_rewards.hpsv3.resize", resize),
        patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield


def to_double(thing: object, seen: set[int] | None = None) -> None:
    """Modules and tensors of a reward, and of what it holds, in float64."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return
    seen.add(id(thing))
    held = enumerate(thing) if isinstance(thing, list) else vars(thing).items()
    for key, value in list(held):
        if isinstance(value, nn.Module):
            value.double()
        elif isinstance(value, torch.Tensor) and value.is_floating_point():
            setattr(thing, key, value.double())
        elif isinstance(value, list) or type(value).__module__.startswith("diffalign."):
            to_double(value, seen)


def broken(name: str) -> str:
    """A NaN in one sample costs its own score, and no other's score or gradient."""
    reward = built(name)
    given = samples(reward)
    expected = scores(name, given).value
    given[1].view(-1)[5] = torch.nan
    leaf = given.clone().requires_grad_()
    with torch.enable_grad():
        score = scores(name, leaf)
    assert score.valid.tolist() == [True, False, True]
    assert score.value[1].isnan()
    torch.testing.assert_close(score.value[[0, 2]].detach(), expected[[0, 2]], rtol=1e-4, atol=1e-5)
    if reward.differentiable:
        (found,) = torch.autograd.grad(score.value[score.valid].sum(), leaf)
        assert found[[0, 2]].isfinite().all()
        assert not found[1].any()
    return "left out, with the reason"


def long_prompt(name: str) -> str:
    """What is past the token limit is cut off and told, and changes nothing."""
    reward = built(name)
    if "prompt" not in reward.needs:
        return "reads none"
    given, text = samples(reward)[:1], 'a sign "GO" ' + LONG
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("diffalign")
    logger.addHandler(handler)
    try:
        first, second = (scores(name, given, [words]) for words in (text, text + "in the snow"))
    finally:
        logger.removeHandler(handler)
    assert first.valid.all()
    if reward.token_limit is None:
        return "reads all of it"
    assert torch.equal(first.value, second.value)
    assert any(f"at most {reward.token_limit} tokens" in record for record in records)
    return f"cut at {rewards.read_recipe(rewards.shipped_recipes()[SCORERS[name].card]).token_limit}, told"


def licence(name: str) -> str:
    """Its card tells."""
    return rewards.read_recipe(rewards.shipped_recipes()[SCORERS[name].card]).licence.partition(";")[0]


PROPERTIES: dict[str, Callable[[str], str]] = {
    "published layout loads": layout,
    "batch-invariant": batch,
    "PIL = tensor": saved,
    "gradient": gradient,
    "NaN": broken,
    "long prompt": long_prompt,
    "licence": licence,
}


@pytest.mark.parametrize("promise", PROPERTIES)
@pytest.mark.parametrize("scorer", [name for name, scorer in SCORERS.items() if scorer.library is None])
def test_every_scorer_keeps_every_promise(scorer: str, promise: str) -> None:
    assert PROPERTIES[promise](scorer)


@pytest.mark.verify
def test_a_model_of_open_clip_keeps_them_too(with_open_clip: Callable[[str], str]) -> None:
    """In the process in which it can be imported."""
    code = "from tests.rewards.test_contract import PROPERTIES\n"
    printed = with_open_clip(code + "for promise in PROPERTIES.values(): print('kept:', promise('open_clip'))")
    assert printed.count("kept:") == len(PROPERTIES), printed


def main() -> None:
    """Print the contract's table in Markdown."""
    absent = [name for name, scorer in SCORERS.items() if not scorer.runs()]
    print_table("scorer", {name: name for name in SCORERS if name not in absent}, PROPERTIES)
    for name in absent:
        print(
            f"| {name} | " + " | ".join([f"not run: {SCORERS[name].library} is not installed"] * len(PROPERTIES)) + " |"
        )


if __name__ == "__main__":
    main()
