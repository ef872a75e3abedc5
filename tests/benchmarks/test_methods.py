"""The benchmark of methods: its recipes are whole, and its table counts as it says."""

import numpy as np

from tests.benchmarks.methods import ETA, METHODS, REWARD_CALLS, recipe_of
from tests.benchmarks.methods_tables import differences, row


def test_every_job_spends_the_budget_of_reward_calls(tmp_path):
    for name, job in METHODS.items():
        recipe = recipe_of(name, 1, tmp_path / name)
        assert recipe.seed == 1
        assert (recipe.evaluation.num_inference_steps, recipe.evaluation.guidance_scale) == (6, 1)
        assert recipe.evaluation.eta == ETA[job.pipeline]
        assert recipe.pipeline.path.endswith(job.pipeline)
        if job.on_pairs:
            assert recipe.method.pairs == str(tmp_path / f"pairs-{job.pipeline}.1.parquet")
            continue
        spent = recipe.max_train_steps * recipe.num_prompts_per_step * recipe.group_size
        budget = {"b2_diffurl_long": 7488, "ddpo_long": 38_400}.get(name, REWARD_CALLS)
        assert 0.97 * budget <= spent <= budget
        how = (recipe.method.num_inference_steps, recipe.method.guidance_scale, recipe.method.eta)
        assert how == (6, 2 if name == "raft" else 1, ETA[job.pipeline])


def test_differences_are_paired_by_prompt_and_seed():
    base = np.random.default_rng(0).normal(size=(64, 2))
    shift = np.linspace(0.1, 0.3, 64)[:, None]
    judges = ("shapes-clip", "shapes-preference", "shapes-oracle")

    cost = {"reward_calls": 1024, "nfe": 6144}

    def of(values, seed):
        return {"scores": dict.fromkeys(judges, values.tolist()), "diversity": [0.25], "seed": seed, "cost": cost}

    before = [of(base, 0), of(base + 9, 1)]
    tuned = [of(base - shift, 0)]
    cells = row([of(base + shift, 0)], before, [*tuned, of(base, 1)])
    half = 1.96 * shift.std(ddof=1) / 8
    assert cells[1] == f"{(base + shift).mean():.3f} (+0.200 ± {half:.3f} *)"
    assert cells[3] == f"{100 * (base + shift).mean():.1f} (+20.0 ± {100 * half:.1f} *)"
    assert cells[4] == f"+0.400 ± {2 * half:.3f} *"
    assert row([of(base, 1)], before, tuned)[4] == row(tuned, before, tuned)[4] == ""
    assert cells[5:] == ["0.250", "", "1,024", "6,144", ""]


def test_one_method_less_another_is_on_the_seeds_that_both_have(capsys):
    base = np.random.default_rng(0).normal(size=(16, 2))
    judges = ("shapes-clip", "shapes-preference", "shapes-oracle")

    def of(name, seed, shift):
        return {
            "name": name,
            "seed": seed,
            "scores": dict.fromkeys(judges, (base + shift).tolist()),
            "diversity": [0.25, 0.5],
        }

    differences([of("prdp", 0, 0.5), of("prdp", 1, 9), of("ddpo", 0, 0.25), of("ddpo", 2, 9)])
    *_, line = capsys.readouterr().out.splitlines()
    assert line.startswith("| prdp | ddpo | 1 | +0.250 ± 0.000 * | +0.25 ± 0.00 * | +25.0 ± 0.0 * | +0.0000 ± 0.0000 |")
