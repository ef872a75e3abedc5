"""The supervised term beside any method: its formula on diffusers' own parts, its draws, and that it is only added."""

import json
from collections import Counter

import pytest
import torch

from diffalign import media
from diffalign.config import load_recipe
from diffalign.data import Pair, Prompt
from diffalign.engine.run import train
from diffalign.engine.state import load_tree, save_tree
from diffalign.finetune import (
    DDPO,
    NFT,
    PRDP,
    RAFT,
    RWR,
    B2DiffuRL,
    DiffusionDPO,
    Dragon,
    FlowDPO,
    FlowGRPO,
    RewardBackprop,
)
from diffalign.policies import Policy
from diffalign.policies.tiny import tiny_sd, tiny_sd3
from tests.finetune.tiny_training import gradient, perturb, redness

CAPTIONS = ["a red circle", "a blue square", "a green star"]


@pytest.fixture
def listed(tmp_path):
    """A list of three images as `diffalign sample` writes one."""
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    for i, image in enumerate(images):
        media.save_png(image, tmp_path / f"{i}.png")
    lines = [json.dumps({"file": f"{i}.png", "prompt": caption, "seed": 0}) for i, caption in enumerate(CAPTIONS)]
    path = tmp_path / "samples.jsonl"
    path.write_text("\n".join(lines))
    return path


def policy_of(make, dtype=torch.float32):
    policy = Policy.wrap(make(dtype))
    policy.add_lora(rank=2, alpha=2)
    perturb(policy)
    return policy


def trainer(method=RWR, make=tiny_sd, dtype=torch.float32, sft=None, reward=redness, **settings):
    """Nothing is clipped, so that gradients add up."""
    how = {"num_prompts_per_step": 2, "max_grad_norm": 1e9, "sft": sft}
    if method not in (DiffusionDPO, FlowDPO):
        how |= {"num_inference_steps": 2, "group_size": 2}
    if method is RWR:
        how["temperature"] = 1.0
    return method(policy_of(make, dtype), reward, **how | settings)


@pytest.mark.parametrize("make", [tiny_sd, tiny_sd3])
def test_errors_and_gradient_are_those_of_the_formula_in_float64(listed, make):
    listed.write_text(listed.read_text().splitlines()[0])  # of one image, so that it is known which was drawn
    t = trainer(make=make, dtype=torch.float64, sft={"images": str(listed), "weight": 0.5, "batch_size": 4})
    seen, predict = [], t.policy.predict
    t.policy.predict = lambda x, level, condition: seen.append((x, level)) or predict(x, level, condition)
    total, ledger = t.supervised.accumulate(3, 1, slice(None), 4)
    found, ((x, level),) = gradient(t), seen
    t.optimizer.zero_grad()

    pipe, embeds = t.policy.pipe, t.policy.encode(CAPTIONS[:1] * 4).tensors
    pixels = media.from_pil([media.open_image(listed.parent / "0.png")]).double() * 2 - 1
    with torch.no_grad():
        x0 = pipe.vae.encode(pixels).latent_dist.mode()
    assert x0.shape[1:] == t.policy.latent_shape()  # nothing was resized
    x0 = (x0 - (getattr(pipe.vae.config, "shift_factor", None) or 0)) * pipe.vae.config.scaling_factor
    alpha, sigma = (c.reshape(-1, 1, 1, 1) for c in (level.alpha, level.sigma))
    noise = (x - alpha * x0) / sigma
    if make is tiny_sd3:
        told = {"encoder_hidden_states": embeds["prompt_embeds"], "pooled_projections": embeds["pooled_prompt_embeds"]}
        output, target = pipe.transformer(hidden_states=x, timestep=level.timestep.float(), **told).sample, noise - x0
    else:
        output = pipe.unet(x, level.timestep.long(), encoder_hidden_states=embeds["prompt_embeds"]).sample
        target = noise
    error = (output - target).square().mean((1, 2, 3))
    (0.5 * error.mean()).backward()
    torch.testing.assert_close(total, error.sum().detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found, gradient(t), rtol=1e-4, atol=1e-6 * float(found.abs().max()))
    assert found.abs().max() > 0
    assert noise.flatten(1).std(1).sub(1).abs().max() < 0.4  # standard normal, of 256 elements or more
    assert len(level.timestep.unique()) == 4
    assert (ledger.denoiser_evaluations, ledger.backward_passes, ledger.reward_calls) == (4, 4, 0)


def test_every_update_draws_anew_and_images_are_alike(listed):
    t = trainer(num_inner_epochs=2, sft={"images": str(listed), "weight": 1.0, "batch_size": 8})
    drawn, at = [], []
    t.supervised.error = lambda numbers, rows, condition: (
        drawn.append(numbers) or at.extend(rows) or t.parameters[0].sum() * torch.zeros(len(rows))
    )
    for seed in (0, 1):
        t.supervised.seed = seed
        for step in range(25):
            for update in (0, 1):
                t.supervised.accumulate(step, update, slice(None), 8)
    assert len(set(drawn)) > 95  # of 100 draws, each one of 3^8
    counts = Counter(number for numbers in drawn for number in numbers)
    assert all(abs(count - 800 / 3) < 4 * (800 * 2 / 9) ** 0.5 for count in counts.values())
    at.clear()
    t.train(["a", "b"], steps=2)
    assert at == [(step, update, i) for step in range(2) for update in range(2) for i in range(8)]


def test_parts_of_a_batch_add_up(listed):
    """As processes and micro-batches take them."""
    found = []
    for parts, at_once in (([slice(None)], 6), ([slice(None)], 1), ([slice(0, None, 2), slice(1, None, 2)], 2)):
        t = trainer(dtype=torch.float64, sft={"images": str(listed), "weight": 2.0, "batch_size": 6})
        totals = [t.supervised.accumulate(0, 0, part, at_once)[0] for part in parts]
        found.append((torch.stack(totals).sum(), gradient(t)))
    for total, of_parts in found[1:]:
        torch.testing.assert_close(total, found[0][0], rtol=1e-9, atol=0)
        torch.testing.assert_close(of_parts, found[0][1], rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({"micro_batch_size": 3}, [3, 3, 2]), ({}, [4, 4]), ({"num_minibatches": 2}, [2, 2, 2, 2] * 2)],
)
def test_no_more_are_evaluated_together_than_images_of_the_method(listed, settings, expected):
    """Two prompts with two samples each."""
    t = trainer(sft={"images": str(listed), "weight": 1.0, "batch_size": 8}, **settings)
    sizes, error = [], t.supervised.error
    t.supervised.error = lambda numbers, *rest: sizes.append(len(numbers)) or error(numbers, *rest)
    t.train(["a", "b"], steps=1)
    assert sizes == expected


ONLINE = [
    (RewardBackprop, tiny_sd, {}),
    (DDPO, tiny_sd, {"advantage": "group"}),
    (PRDP, tiny_sd, {"beta": 0.1, "clip_range": 1.0}),
    (FlowGRPO, tiny_sd3, {}),
    (B2DiffuRL, tiny_sd, {"advantage": "group", "select_threshold": 0.0}),
    (RWR, tiny_sd, {}),
    (RAFT, tiny_sd, {}),
    (NFT, tiny_sd3, {}),
    (Dragon, tiny_sd3, {}),
]


@pytest.mark.parametrize(("method", "make", "settings"), ONLINE, ids=[method.__name__ for method, *_ in ONLINE])
def test_it_is_added_to_the_gradient_of_every_method(listed, method, make, settings):
    check_added(listed, lambda sft: trainer(method, make, torch.float64, sft, **settings), ["a red circle", "a star"])


@pytest.mark.parametrize(("method", "make"), [(DiffusionDPO, tiny_sd), (FlowDPO, tiny_sd3)])
def test_it_is_added_to_that_of_pairs(listed, method, make):
    files = [listed.parent / f"{i}.png" for i in (0, 1)]
    pairs = [Pair(Prompt("a", 0), *files, "row 0"), Pair(Prompt("b", 1), *reversed(files), "row 1")]
    check_added(listed, lambda sft: trainer(method, make, torch.float64, sft, pairs=pairs), [p.prompt for p in pairs])


def check_added(listed, make_trainer, prompts):
    """What the optimiser is given is the method's own gradient and the term's; the row tells the mean error, and the
    cost of each image."""
    kept, rows = [], []
    for sft in (None, {"images": str(listed), "weight": 0.25, "batch_size": 5}):
        t = make_trainer(sft)
        t.optimizer.register_step_pre_hook(lambda *_, t=t: kept.append(gradient(t)))
        rows += t.train(prompts, steps=1).rows
    alone = make_trainer(sft)
    total, _ = alone.supervised.accumulate(0, 0, slice(None), 5)
    torch.testing.assert_close(kept[1] - kept[0], gradient(alone), rtol=1e-6, atol=1e-9 * float(kept[1].abs().max()))
    assert float(gradient(alone).abs().max()) > 1e-4 * float(kept[0].abs().max())
    assert rows[1]["sft"] == pytest.approx(float(total) / 5, rel=1e-6)
    assert rows[1]["loss"] == pytest.approx(rows[0]["loss"], rel=1e-6)  # the method's own
    assert "sft" not in rows[0]
    assert rows[1]["nfe"] - rows[0]["nfe"] == rows[1]["backward_passes"] - rows[0]["backward_passes"] == 5


def test_the_row_tells_the_mean_over_the_updates(listed):
    t = trainer(dtype=torch.float64, num_minibatches=2, sft={"images": str(listed), "weight": 1.0, "batch_size": 5})
    told, accumulate = [], t.supervised.accumulate
    t.supervised.accumulate = lambda *args: told.append(accumulate(*args)) or told[-1]
    row = t.train(["a", "b"], steps=1).rows[0]
    assert row["sft"] == pytest.approx(float(told[0][0] + told[1][0]) / 10, rel=1e-6)


def test_in_bfloat16_the_error_is_near_that_in_float32(listed):
    t, totals = trainer(sft={"images": str(listed), "weight": 1.0}), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            totals.append(float(t.supervised.accumulate(0, 0, slice(None), 16)[0]))
    assert totals[1] != totals[0]
    assert totals[1] == pytest.approx(totals[0], rel=0.03)
    assert gradient(t).dtype == torch.float32


def test_the_policy_learns_the_images(listed):
    """With a reward that says nothing, from a perturbed adapter."""
    sft, silent = {"images": str(listed), "weight": 1.0}, lambda images, prompts, metadata: torch.zeros(len(images))
    t = trainer(FlowGRPO, tiny_sd3, sft=sft, reward=silent, learning_rate=1e-2)
    before, _ = t.supervised.accumulate(999, 0, slice(None), 16)  # the same draws both times
    assert t.train(["a", "b"], steps=15)["zero_variance"] == [1.0] * 15
    after, _ = t.supervised.accumulate(999, 0, slice(None), 16)
    assert after < 0.85 * before


def test_a_resumed_run_is_bit_equal(listed, tmp_path):
    settings = {"num_inner_epochs": 2, "sft": {"images": str(listed), "weight": 1.0, "cache": str(tmp_path / "cache")}}
    whole = trainer(**settings)
    whole.train(["a", "b"], steps=1)
    save_tree(tmp_path / "state", whole.state_dict())
    again = trainer(**settings)
    again.load_state_dict(load_tree(tmp_path / "state"))
    rows = [t.train(["a", "b"], steps=1).rows[0] for t in (whole, again)]
    assert rows[0]["sft"] == rows[1]["sft"]
    for p, q in zip(whole.parameters, again.parameters, strict=True):
        assert torch.equal(p, q)
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 3 + 3 + 2  # images, their captions, prompts


def test_an_image_that_cannot_be_opened_is_named_with_its_line(listed):
    (listed.parent / "1.png").write_bytes(b"no image")
    t = trainer(sft={"images": str(listed), "weight": 1.0, "batch_size": 30})
    with pytest.raises(ValueError, match=r"samples.jsonl, line 2: .*1\.png .*Mend the image, or take the line out"):
        t.train(["a", "b"], steps=1)


RECIPE = """
pipeline: {path: zoo:shapes-sd}
adapter: {rank: 2, alpha: 2}
method: {name: rwr, num_inference_steps: 2, temperature: 1.0}
rewards: {train: [jpeg-size]}
prompts: {train: prompts.txt, validation: prompts.txt, test: prompts.txt}
sft: {images: samples.jsonl, weight: 0.1, batch_size: 2}
num_prompts_per_step: 2
group_size: 2
max_train_steps: 2
evaluation: {num_inference_steps: 2, validation_steps: 2}
output_dir: run
"""


def test_a_recipe_has_it(listed, monkeypatch):
    """Its list lies beside the recipe, wherever the command is given."""
    folder = listed.parent
    (folder / "prompts.txt").write_text("a red circle\na blue square\n")
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    recipe = load_recipe(folder / "recipe.yaml")
    assert recipe.sft.images == str(listed)
    train(recipe, Policy.wrap(tiny_sd()))
    rows = [json.loads(line) for line in (folder / "elsewhere" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row.get("sft", 0) > 0] == [1, 2]
    config = (folder / "elsewhere" / "run" / "config.yaml").read_text()
    assert "sft.images: " in config[config.index("sha256:") :]
