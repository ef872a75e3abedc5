"""PAL: what it recovers of known users, what a few choices of a new one give, and that it comes back from files."""

import math
from dataclasses import replace

import pytest
import torch
import yaml
from torch.nn.functional import normalize

import diffalign.rewards.pal.recipes  # noqa: F401  registers the type
from diffalign import rewards
from diffalign.rewards import check_gradient
from diffalign.rewards.encoders import load_encoder
from diffalign.rewards.pal import PalModel, PalReward, UserPairs, fit_pal, fit_user, measure_pal, write_pal
from diffalign.rewards.preference import PreferenceHead, encode_pairs

WIDTH, SPACE, USERS = 8, 4, 20
HOW = {"dimension": SPACE, "batch_size": 256, "learning_rate": 2e-2, "epochs": 25, "patience": 5}


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def true_margin(variant, first, second, text, mixture):
    """r_u(first) - r_u(second) of a world with two known prototypes, written out for each pair."""
    f, points, turns = 3 * draw(WIDTH, SPACE, seed=1), 4.5 * draw(2, SPACE, seed=2), draw(2, WIDTH, SPACE, seed=3)
    if variant == "A":
        ideal = mixture @ points
        return ((second @ f - ideal).square().sum(1) - (first @ f - ideal).square().sum(1)) / 2
    direction = mixture[:, :1] * (text @ turns[0]) + mixture[:, 1:] * (text @ turns[1])
    return ((first - second) @ f * direction).sum(1)


def shares_of(users, seed):
    """Mixtures (U, 2) of users who mostly like one prototype."""
    generator = torch.Generator().manual_seed(seed)
    less = 0.3 * torch.rand(users, generator=generator)
    share = torch.where(torch.rand(users, generator=generator) < 0.5, less, 1 - less)
    return torch.stack([share, 1 - share], dim=1)


def choices(variant, mixtures, count, seed, user=None):
    """Noisy choices of random users, or of one; and how often the better image was chosen: no rule can do better."""
    generator = torch.Generator().manual_seed(seed)
    first, second, text = (normalize(torch.randn(count, WIDTH, generator=generator), dim=1) for _ in range(3))
    who = torch.randint(len(mixtures), (count,), generator=generator) if user is None else torch.full((count,), user)
    margin = true_margin(variant, first, second, text, mixtures[who])
    outcome = torch.where(torch.rand(count, generator=generator) < margin.sigmoid(), 1, -1)
    users = tuple(f"user {i}" for i in who.tolist())
    pairs = UserPairs(first, second, text, outcome, tuple(f"prompt {i % 50}" for i in range(count)), users)
    return pairs, ((margin > 0) == (outcome > 0)).float().mean().item()


@pytest.fixture(scope="module", params=["A", "B"])
def world(request):
    """(variant, mixtures of the users, model that was fitted to their choices)."""
    mixtures = shares_of(USERS, seed=0)
    fitted = fit_pal(choices(request.param, mixtures, 5000, 10)[0], variant=request.param, prototypes=2, **HOW)
    return request.param, mixtures, fitted


def test_the_users_and_nearly_the_bayes_rule_are_recovered(world):
    variant, mixtures, fitted = world
    fresh, bayes = choices(variant, mixtures, 4000, 11)
    accuracy = measure_pal(fitted.head, fresh)["accuracy"]
    assert bayes - 0.025 < accuracy <= bayes + 0.01
    found = fitted.head.mixtures([f"user {i}" for i in range(USERS)])[:, 0]
    assert torch.corrcoef(torch.stack([found, mixtures[:, 0]]))[0, 1].abs() > 0.97

    def nameless(pairs):
        return UserPairs.of(pairs, ("all",) * len(pairs))

    one = fit_pal(nameless(choices(variant, mixtures, 5000, 10)[0]), variant=variant, prototypes=1, **HOW)
    assert accuracy > measure_pal(one.head, nameless(fresh))["accuracy"] + 0.07  # what one reward for all can do


def test_a_few_choices_of_a_new_user_beat_the_population(world):
    variant, _, fitted = world
    strangers = shares_of(16, seed=77)
    gains, best = {8: [], 64: []}, []
    for user in range(16):
        fresh, bayes = choices(variant, strangers, 800, 500 + user, user)
        everyone = measure_pal(fitted.head, fresh, fitted.head.population)["accuracy"]
        best.append(bayes - everyone)
        for count, found in gains.items():
            mixture = fit_user(fitted.head, choices(variant, strangers, count, 100 + user, user)[0])
            found.append(measure_pal(fitted.head, fresh, mixture)["accuracy"] - everyone)
    few, many, bayes = (torch.tensor(found) for found in (gains[8], gains[64], best))
    assert few.mean() > 0.04
    assert few.mean() > 3 * few.std() / 4  # of 16 users
    assert bayes.mean() - 0.03 < many.mean() < bayes.mean() + 0.01


@pytest.mark.parametrize("variant", ["A", "B"])
def test_rewards_are_the_formulas(variant):
    model = PalModel(3, ["a", "b"], variant=variant, prototypes=2, dimension=2, seed=4)
    x, t = draw(2, 3, seed=5), draw(2, 3, seed=6)
    found = model(x, t, model.mixtures(["b", "a"]))
    for row, user in enumerate([1, 0]):
        logits = model.logits[user].tolist()
        w = [math.exp(logit) / sum(math.exp(other) for other in logits) for logit in logits]
        f = model.output.weight @ (x[row] * math.sqrt(3))
        if variant == "A":
            truth = -sum((f[i] - w[0] * model.points[0, i] - w[1] * model.points[1, i]) ** 2 for i in range(2))
        else:
            g = (model.directions.weight @ (t[row] * math.sqrt(3)) + model.directions.bias).tolist()
            truth = sum(f[i] * (w[0] * g[i] + w[1] * g[2 + i]) for i in range(2))
        torch.testing.assert_close(found[row], truth)


@pytest.mark.parametrize("variant", ["A", "B"])
@pytest.mark.parametrize("hidden", [0, 5])
def test_gradients_and_invariances(variant, hidden):
    model = PalModel(6, ["a", "b", "c"], variant=variant, prototypes=3, dimension=4, hidden=hidden, seed=1).double()
    x, y, t = (draw(3, 6, seed=seed).double() for seed in range(3))
    mixture = model.mixtures(["c", "a", "b"]).detach()
    assert torch.autograd.gradcheck(model, (x.requires_grad_(), t.requires_grad_(), mixture.requires_grad_()))
    # Margins are linear in the mixture: that of a mixture is the mixture of those of the prototypes.
    margin = model(x, t, mixture) - model(y, t, mixture)
    pure = [row.expand(3, -1) for row in torch.eye(3, dtype=torch.float64)]
    each = torch.stack([model(x, t, one) - model(y, t, one) for one in pure], dim=1)
    torch.testing.assert_close(margin, (mixture * each).sum(1))
    before, order = model(x, t, mixture), [2, 0, 1]
    with torch.no_grad():
        model.logits.copy_(model.logits[:, order])
        if variant == "A":
            model.points.copy_(model.points[order])
        else:
            model.directions.weight.copy_(model.directions.weight.reshape(3, 4, 6)[order].reshape(12, 6))
            model.directions.bias.copy_(model.directions.bias.reshape(3, 4)[order].reshape(12))
    torch.testing.assert_close(model(x, t, model.mixtures(["c", "a", "b"])), before)


def test_a_new_user_is_the_minimum_of_the_stated_objective(world):
    variant, mixtures, fitted = world
    few, _ = choices(variant, mixtures, 6, 3, 0)
    model = fitted.head
    grid = torch.linspace(1e-4, 1 - 1e-4, 4001, dtype=torch.float64)
    margin = [
        model(few.first, few.text, row.expand(6, -1)) - model(few.second, few.text, row.expand(6, -1))
        for row in torch.eye(2)
    ]
    signed = (grid[:, None] * margin[0] + (1 - grid)[:, None] * margin[1]) * few.outcome
    v = model.population.double()
    loss = (1 + (-signed).exp()).log().sum(1) - 2.5 * (v[0] * grid.log() + v[1] * (1 - grid).log())
    found = fit_user(model, few, prior=2.5)
    assert found[0].item() == pytest.approx(grid[loss.argmin()].item(), abs=3e-4)
    assert found.sum().item() == pytest.approx(1)
    torch.testing.assert_close(fit_user(model, few, prior=1e6), v, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="prior is 0"):
        fit_user(model, few, prior=0)


def test_the_same_seed_gives_the_same_model_and_another_seed_another():
    pairs, _ = choices("A", shares_of(5, seed=0), 300, 1)
    state = torch.get_rng_state()
    one, two, other = (fit_pal(pairs, epochs=3, dimension=SPACE, hidden=3, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.head.parameters(), two.head.parameters(), strict=True))
    assert not torch.equal(one.head.points, other.head.points)


def test_what_is_wrong_is_told():
    pairs, _ = choices("A", shares_of(5, seed=0), 60, 1)
    with pytest.raises(ValueError, match="variant is 'C'"):
        PalModel(4, ["a"], variant="C")
    with pytest.raises(ValueError, match="2 users with 1 names"):
        PalModel(4, ["a", "a"])
    with pytest.raises(ValueError, match="1 users for 60 pairs"):
        replace(pairs, users=("a",))
    with pytest.raises(ValueError, match="60 of the pairs are ties"):
        replace(pairs, outcome=torch.zeros(60))
    with pytest.raises(ValueError, match="user 'stranger' is none of the 5 known"):
        fit_pal(pairs, UserPairs.of(pairs, ("stranger",) * 60), epochs=1)
    alone = UserPairs.of(pairs, tuple(f"{i}" for i in range(60)))  # nobody occurs twice
    with pytest.raises(ValueError, match=r"\[0\] rows"):
        fit_pal(alone, epochs=1)


@pytest.fixture(scope="module")
def encoder(tiny_clip):
    return load_encoder(tiny_clip)


def pictures(count, seed=0):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("variant", ["A", "B"])
def test_a_model_comes_back_from_its_files(encoder, tiny_clip, tmp_path, variant):
    count, prompts = 24, ["a red circle", "a green circle", "a blue square"] * 8
    pairs = encode_pairs(encoder, pictures(count), pictures(count, 1), prompts, [1, -1] * 12)
    mine = UserPairs.of(pairs, ("ann", "bob", "7") * 8)
    fitted = fit_pal(mine, mine, variant=variant, prototypes=3, dimension=5, hidden=4, epochs=2)
    fitted = replace(fitted, head=fitted.head.with_user("new", fit_user(fitted.head, pairs.take(torch.arange(4)))))
    file = write_pal(tmp_path, "tastes", fitted, path=str(tiny_clip), licence="MIT", source="a test")
    reward = rewards.load(file)
    assert isinstance(reward, PalReward)
    assert reward.needs == (("user",) if variant == "A" else ("prompt", "user"))
    assert yaml.safe_load(file.read_text())["needs"] == list(reward.needs)
    who = [{"user": "ann"}, {"user": "new"}, {"user": 7}]
    score = reward(pictures(3), prompts[:3], who)
    assert score.valid.all()
    direct = PalReward(encoder, fitted.head)
    assert torch.equal(direct(pictures(3), prompts[:3], who).value, score.value)
    alone = torch.cat([reward(pictures(3)[i : i + 1], prompts[i : i + 1], who[i : i + 1]).value for i in range(3)])
    torch.testing.assert_close(alone, score.value)
    assert (check_gradient(reward, pictures(3), prompts[:3], who) > 0).all()
    other = reward(pictures(3), prompts[:3], [{"user": "bob"}] * 3)
    assert not torch.allclose(other.value, score.value)


def test_only_samples_without_a_known_user_fail(encoder):
    reward = PalReward(encoder, PalModel(16, ["ann"]))
    score = reward(pictures(4), ["x"] * 4, [{"user": "ann"}, {"user": "eve"}, {}, {"user": "ann"}])
    assert score.valid.tolist() == [True, False, False, True]
    assert "user 'eve' is none of the 1 known" in score.reasons[1]
    assert 'no metadata["user"]' in score.reasons[2]


def test_users_are_added_and_replaced():
    model = PalModel(4, ["ann", "bob"], prototypes=2)
    first, second = torch.tensor([0.25, 0.75]), torch.tensor([1.0, 0.0])
    both = model.with_user("eve", first).with_user("ann", second)
    assert both.users == ("bob", "eve", "ann")
    torch.testing.assert_close(both.mixtures(["ann", "eve"]), torch.stack([second, first]))
    torch.testing.assert_close(both.mixtures(["bob"]), model.mixtures(["bob"]))
    assert model.users == ("ann", "bob")


def test_files_of_others_are_refused(encoder, tmp_path):
    PreferenceHead(16).save(tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match=r"is no PAL model: it holds output\.bias"):
        PalReward(encoder, tmp_path / "head.safetensors")
    PalModel(5, ["ann"]).save(tmp_path / "narrow.safetensors")
    with pytest.raises(ValueError, match="embeddings of 5 numbers"):
        PalReward(encoder, tmp_path / "narrow.safetensors")
