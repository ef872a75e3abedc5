"""Branches share what comes before the split, and nothing after it."""

import pytest
import torch

from diffalign.laws import DDIM, FlowSDE
from diffalign.policies import Policy
from diffalign.policies.tiny import tiny_sd, tiny_sd3
from diffalign.rollout import branched_rollout, rollout, transition

PROMPTS, ROWS = ["a bad dog", "a fine lake"], [(7,), ("b",)]


@pytest.fixture(scope="module", params=["sd", "sd3"])
def run(request):
    """(policy, condition, law, schedule)."""
    policy, law = (Policy.wrap(tiny_sd()), DDIM(1.0)) if request.param == "sd" else (Policy.wrap(tiny_sd3()), FlowSDE())
    return policy, policy.encode(PROMPTS), law, policy.schedule(4)


def branched(run, **settings):
    settings = {"branches": 3, "split": 2, "seed": 5, "guidance_scale": 2.0} | settings
    return branched_rollout(*run, rows=ROWS, **settings)


def test_the_split_is_the_parents_state_and_branches_differ_after_it(run):
    parents = rollout(*run, rows=ROWS, seed=5, guidance_scale=2.0, record_states=True)
    found = branched(run)
    shared = found.states[2].unflatten(0, (2, 3))
    torch.testing.assert_close(shared, parents.states[2][:, None].expand_as(shared))
    assert found.states[:2] == found.transitions[:2] == [None, None]
    after = found.states[3].unflatten(0, (2, 3))
    assert (after[:, :1] - after[:, 1:]).abs().amax((2, 3, 4)).min() > 1e-3
    assert torch.equal(found.latents, found.states[-1])
    assert found.stochastic.tolist()[:2] == [False, False]


def test_each_step_is_a_draw_of_its_gaussian(run):
    """Recorded Gaussians are those of the policy at recorded states, exactly, and noise is that of (row, branch)."""
    policy, condition, law, schedule = run
    found = branched(run)
    many = condition.rows([0, 0, 0, 1, 1, 1])
    for step in (2, 3):
        with torch.no_grad():
            now = transition(policy, found, many, law, schedule, step, guidance_scale=2.0)
        assert torch.equal(now.mean, found.transitions[step].mean)
    whole = rollout(policy, many, law, schedule, rows=[(*row, b) for row in ROWS for b in range(3)], seed=5,
                    guidance_scale=2.0, record_states=True, record_transitions=True)  # fmt: skip
    noise = [(t.states[3] - t.transitions[2].mean) / t.transitions[2].std.view(-1, 1, 1, 1) for t in (whole, found)]
    torch.testing.assert_close(noise[0], noise[1], rtol=1e-3, atol=1e-3)


def test_the_prefix_is_evaluated_once(run):
    calls, policy = [], run[0]
    kept = policy.evaluate
    policy.evaluate = lambda x, *rest: calls.append(len(x)) or kept(x, *rest)
    try:
        found = branched(run)
    finally:
        del policy.evaluate
    assert sum(calls) == found.ledger.denoiser_evaluations == 2 * (2 * 2 + 6 * 2)


@pytest.mark.parametrize("size", [1, 4])
def test_micro_batches_change_nothing(run, size):
    found = branched(run, micro_batch_size=size)
    torch.testing.assert_close(found.latents, branched(run).latents, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("split", [4, -1])
def test_a_split_without_steps_after_it_is_refused(run, split):
    with pytest.raises(ValueError, match=f"split = {split} of 4 steps"):
        branched(run, split=split)
