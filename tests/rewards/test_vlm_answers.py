"""From a judge's answers to scores: yes-logit, rating, pairs and goal-baseline, against closed forms."""

import itertools
import math

import pytest
import torch

from diffalign.rewards.encoders import DualEncoder
from diffalign.rewards.vlm import Answers, GoalBaseline, Judge, PairwiseJudge, Rating, YesLogit
from diffalign.rewards.vlm.questions import filled

LIGHT = torch.linspace(0.1, 0.9, 5)


class Brightness(Judge):
    """Answers by the brightness of the images; says yes, prefers the brighter, but the first by ``bias``."""

    name = "brightness"
    differentiable = True

    def __init__(self, bias=0.0, broken=()):
        self.bias, self.broken, self.asked = bias, set(broken), []

    def log_probs(self, questions, words):
        self.asked += questions
        return torch.stack([self.row(question, words) for question in questions])

    def row(self, question, words):
        light = [image.mean() for image in question.images]
        if {round(float(x), 3) for x in light} & self.broken:
            raise RuntimeError("this image is too much for me")
        if words == ("1", "2"):
            return torch.stack([5 * (light[0] - light[1]) + self.bias, torch.zeros(())]).log_softmax(dim=0)
        return torch.stack([light[0] * (i + 1) for i in range(len(words))]).log_softmax(dim=0) - 1


class Reader(Brightness):
    """Its answers are read as text: 1 where the first is brighter, and nothing where the two are alike."""

    differentiable = False
    gives_probabilities = False

    def answers(self, questions, words):
        rows, reasons = [], {}
        for index, question in enumerate(questions):
            first, second = (float(image.mean()) for image in question.images)
            if abs(first - second) < 0.01:
                reasons[index] = "the answer 'both' begins with none of 1, 2"
            rows.append([math.nan] * 2 if index in reasons else [0.0, -math.inf] if first > second else [-math.inf, 0])
        return Answers(torch.tensor(rows), reasons)


def images(light=LIGHT):
    return torch.as_tensor(light)[:, None, None, None].expand(-1, 3, 4, 4).contiguous()


def test_three_yes_scores():
    light = images()
    # log p(yes) = s - log(e^s + e^2s) - 1, log p(no) = 2s - log(e^s + e^2s) - 1
    s = LIGHT
    prompts = ["p"] * 5
    torch.testing.assert_close(YesLogit(Brightness())(light, prompts).value, torch.exp(-1 - s.exp().add(1).log()))
    torch.testing.assert_close(YesLogit(Brightness(), score="renormalised")(light, prompts).value, torch.sigmoid(-s))
    torch.testing.assert_close(YesLogit(Brightness(), score="logit")(light, prompts).value, -s)
    with pytest.raises(ValueError, match="score is 'logits'"):
        YesLogit(Brightness(), score="logits")
    with pytest.raises(ValueError, match="gives no probabilities"):
        YesLogit(Reader(), score="logit")


def test_rating_is_an_expectation():
    weights = torch.stack([(LIGHT * k).exp() for k in range(1, 6)])
    truth = (weights * torch.arange(1, 6)[:, None]).sum(dim=0) / weights.sum(dim=0)
    torch.testing.assert_close(Rating(Brightness())(images(), ["p"] * 5).value, truth)


def test_questions_carry_prompt_and_principle():
    judge = Brightness()
    YesLogit(judge, principle="Only colours count. ")(images()[:1], ['a "{red}" cat'])
    assert judge.asked[0].text == (
        "Judge by this principle alone: Only colours count.\n\n"
        'Does this figure show "a "{red}" cat"? Please answer Yes or No.'
    )
    assert filled("Is it beautiful?", "a cat") == "Is it beautiful?"
    assert YesLogit(judge, "Is it beautiful?").needs == ()
    assert YesLogit(judge).needs == ("prompt",)
    with pytest.raises(ValueError, match="has the field 'caption'"):
        Rating(judge, "How well does it show {caption}?")
    with pytest.raises(ValueError, match="is no template"):
        Rating(judge, "A set {1, 2")


def test_a_broken_question_costs_its_own_score():
    score = YesLogit(Brightness(broken=[0.5]))(images(), ["p"] * 5)
    assert score.valid.tolist() == [True, True, False, True, True]
    assert score.reasons == {2: "RuntimeError: this image is too much for me"}


@pytest.mark.parametrize("bias", [0.0, 3.0])
def test_pairs_are_judged_in_both_orders(bias):
    prompts = ["a", "b", "a", "b", "a"]
    judge = Brightness(bias)
    score = PairwiseJudge(judge)(images(), prompts)
    assert len(judge.asked) == 3 * 2 + 2 * 1  # within prompts only

    def chance(i, j):
        return 1 / (1 + math.exp(-(5 * (LIGHT[i] - LIGHT[j]).item() + bias)))

    def beats(i, j):
        return (chance(i, j) + 1 - chance(j, i)) / 2

    truth = [(beats(0, 2) + beats(0, 4)) / 2, beats(1, 3), (beats(2, 0) + beats(2, 4)) / 2, beats(3, 1)]
    truth.append((beats(4, 0) + beats(4, 2)) / 2)
    torch.testing.assert_close(score.value, torch.tensor(truth))
    same = PairwiseJudge(Brightness(bias))(images([0.4, 0.4]), ["a", "a"])
    torch.testing.assert_close(same.value, torch.tensor([0.5, 0.5]))  # whatever the judge thinks of first places


def test_win_rates_of_a_group_do_not_depend_on_their_order():
    reward, light = PairwiseJudge(Brightness(1.0)), images()
    truth = reward(light, ["a"] * 5).value
    for order in itertools.islice(itertools.permutations(range(5)), 7, 120, 31):
        torch.testing.assert_close(reward(light[list(order)], ["a"] * 5).value, truth[list(order)])


def test_pairs_without_an_answer_are_left_out():
    light = [0.2, 0.2, 0.8, 0.5, 0.5]
    prompts = ["a", "a", "a", "b", "b"]
    score = PairwiseJudge(Reader())(images(light), [*prompts[:3], "b", "b"])
    assert score.value[:3].tolist() == [0.0, 0.0, 1.0]  # 0 and 1 have one valid pair each, with 2
    assert score.valid.tolist() == [True, True, True, False, False]
    assert score.reasons[3] == "no pair could be judged; the first: the answer 'both' begins with none of 1, 2"
    alone = PairwiseJudge(Reader())(images([0.2]), ["a"])
    assert "it is the only image of the prompt 'a'" in alone.reasons[0]


def test_a_judge_that_raises_costs_the_pairs_of_one_image():
    score = PairwiseJudge(Brightness(broken=[0.5]))(images(), ["a"] * 5)
    assert score.valid.tolist() == [True, True, False, True, True]
    without = [0, 1, 3, 4]
    clean = PairwiseJudge(Brightness())(images()[without], ["a"] * 4)
    torch.testing.assert_close(score.value[without], clean.value)


class Plane(DualEncoder):
    """A dual encoder in eight dimensions: a fixed linear map of the mean colour, and texts at random."""

    label = "plane"
    token_limit = 77

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.map = torch.randn(3, 8, generator=generator, dtype=torch.float64)
        self.words = {
            text: torch.nn.functional.normalize(torch.randn(8, generator=generator, dtype=torch.float64), dim=0)
            for text in ("a red cat", "a cat", "a photo", "a dog")
        }

    def image_features(self, images):
        return torch.nn.functional.normalize(images.mean(dim=(2, 3)) @ self.map, dim=-1)

    def text_features(self, texts):
        return torch.stack([self.words[text] for text in texts])


def colours():
    return torch.rand(4, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_goal_baseline_equals_the_projection_written_out(alpha):
    encoder, x = Plane(), colours()
    prompts = ["a red cat", "a dog", "a red cat", "a dog"]
    score = GoalBaseline(encoder, ["a cat", "a photo"], alpha=alpha)(x, prompts)
    baseline = (encoder.words["a cat"] + encoder.words["a photo"]) / 2
    for image, prompt, value in zip(x, prompts, score.value, strict=True):
        state, goal = encoder.image_features(image[None])[0], encoder.words[prompt]
        line = goal - baseline
        on_line = baseline + line * (state - baseline).dot(line) / line.dot(line)
        truth = 1 - (alpha * on_line + (1 - alpha) * state - goal).square().sum() / 2
        torch.testing.assert_close(value, truth)
    if alpha == 0:
        cosine = (encoder.image_features(x) * encoder.text_features(prompts)).sum(dim=1)
        torch.testing.assert_close(score.value, cosine)


def test_goal_baseline_has_gradients():
    reward = GoalBaseline(Plane(), "a cat", alpha=0.6, goal="a red cat")
    assert reward.needs == ()
    assert torch.autograd.gradcheck(lambda x: reward(x, ["whatever"] * 4).value, colours().requires_grad_())


def test_goal_baseline_over_clip(tiny_clip):
    from diffalign.rewards.clip import CLIPReward

    clip = CLIPReward(tiny_clip)
    x, prompts = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), ["a red circle", "two squares"]
    torch.testing.assert_close(
        GoalBaseline(clip.encoder, "a circle", alpha=0)(x, prompts).value, clip(x, prompts).value
    )


def test_a_goal_that_is_the_baseline_is_refused():
    score = GoalBaseline(Plane(), "a cat", alpha=0.5)(colours()[:2], ["a cat", "a dog"])
    assert score.valid.tolist() == [False, True]
    assert "'a cat'" in score.reasons[0]
    assert "same embedding" in score.reasons[0]
    with pytest.raises(ValueError, match=r"alpha is 1\.5"):
        GoalBaseline(Plane(), "a cat", alpha=1.5)
    with pytest.raises(ValueError, match="baseline is empty"):
        GoalBaseline(Plane(), [], alpha=0.5)
