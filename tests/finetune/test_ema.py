"""The moving average of the adapter: its numbers, what sees it, and what does not."""

import json

import torch

from diffalign.config import load_recipe
from diffalign.engine.run import train
from diffalign.engine.state import load_tree, save_tree
from diffalign.finetune import RWR
from diffalign.policies import Policy
from diffalign.policies.tiny import tiny_sd
from tests.finetune.tiny_training import redness

DECAYS = [0.0, 2 / 11, 3 / 12, 0.3]  # of updates 1, 2, 3, 4: (1 + n) / (10 + n) from n = 1 on, and 0.3 at most


def trainer(**settings):
    torch.manual_seed(0)
    policy = Policy.wrap(tiny_sd())
    policy.add_lora(rank=2, alpha=2)
    how = {"num_inference_steps": 2, "num_prompts_per_step": 1, "group_size": 2, "temperature": 1.0}
    return RWR(policy, redness, num_inner_epochs=2, ema_decay=0.3, **how, **settings)


def adapter(t):
    return [p.detach().clone() for p in t.parameters]


def assert_equal(found, expected, **tolerances):
    torch.testing.assert_close(found, expected, **{"rtol": 0, "atol": 0} | tolerances)


def test_the_average_is_over_optimiser_updates():
    t, after = trainer(), []
    t.optimizer.register_step_post_hook(lambda *_: after.append(adapter(t)))
    t.train(["a red circle"], steps=2)
    expected = after[0]
    for decay, weights in zip(DECAYS, after, strict=True):
        expected = [decay * a + (1 - decay) * p for a, p in zip(expected, weights, strict=True)]
    with t.averaged():
        assert_equal(adapter(t), expected, rtol=1e-5, atol=1e-8)
        assert any(not torch.equal(a, p) for a, p in zip(adapter(t), after[-1], strict=True))
    assert_equal(adapter(t), after[-1])  # training goes on from the weights themselves


def test_training_does_not_see_it():
    with_average, without = trainer(), trainer()
    without.ema = None
    for t in (with_average, without):
        t.train(["a red circle"], steps=2)
    assert_equal(adapter(with_average), adapter(without))
    with without.averaged():
        assert_equal(adapter(without), adapter(with_average))


def test_a_resumed_average_is_bit_equal(tmp_path):
    whole = trainer()
    whole.train(["a red circle"], steps=1)
    save_tree(tmp_path, whole.state_dict())
    again = trainer()
    again.load_state_dict(load_tree(tmp_path))
    for t in (whole, again):
        t.train(["a red circle"], steps=1)
    assert_equal(whole.state_dict()["ema"], again.state_dict()["ema"])


def test_a_run_judges_and_saves_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    (tmp_path / "recipe.yaml").write_text("""
pipeline: {path: zoo:shapes-sd}
adapter: {rank: 2, alpha: 2}
method: {name: rwr, num_inference_steps: 2, temperature: 1.0}
rewards: {train: [jpeg-size]}
prompts: {train: prompts.txt, validation: prompts.txt, test: prompts.txt}
num_prompts_per_step: 2
group_size: 2
learning_rate: 0.05
max_train_steps: 3
evaluation: {num_inference_steps: 2, validation_steps: 1}
output_dir: run
""")
    rows = {}
    for name, more in (("with", ["ema_decay=0.9"]), ("without", [])):
        torch.manual_seed(0)
        train(load_recipe("recipe.yaml", [f"output_dir={name}", *more]), Policy.wrap(tiny_sd()))
        rows[name] = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("loss") for row in rows["with"]] == [row.get("loss") for row in rows["without"]]
    assert rows["with"][-1]["validation/jpeg-size"] != rows["without"][-1]["validation/jpeg-size"]
    state = load_tree(tmp_path / "with" / "checkpoints" / "step-000003")
    loaded = Policy.wrap(tiny_sd())
    loaded.load_lora(str(tmp_path / "with" / "lora"))
    assert_equal([p.detach() for p in loaded.trainable().values()], state["ema"]["parameters"], rtol=1e-6, atol=1e-8)
    assert any(
        not torch.equal(a, b) for a, b in zip(state["ema"]["parameters"], state["adapter"].values(), strict=True)
    )
