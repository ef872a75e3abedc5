"""Judges that write their scores: the readers on hostile answers, and the way of a text from a model to a score."""

import math

import pytest
import torch

from diffalign import rewards
from diffalign.rewards.vlm import Judge, JudgeServer, LocalVLM, PairwiseJudge, Question
from diffalign.rewards.vlm.judge import AnswerError
from diffalign.rewards.vlm.unified_reward import (
    AXES,
    FINAL_SCORE,
    PAIR_AXES,
    VERDICT,
    read_axes,
    read_final_score,
    read_pair_axes,
    read_verdict,
)
from diffalign.rewards.vlm.written import WrittenPairs, WrittenRating
from tests.rewards.test_vlm_server import Stub, completion
from tests.rewards.tiny_vlm import save_vlm

# As the authors' scripts show them.
GOOD_AXES = "Alignment Score (1-5): 2.694700002670288\nCoherence Score (1-5): 2.3715\nStyle Score (1-5): 2.8025\n"
GOOD_PAIR = (
    "Alignment Score:\n Image 1: 0.435699999332428\n Image 2: 0.564300000667572\n\nCoherence Score:\n"
    " Image 1: 0.418\n Image 2: 0.582\n\nStyle Score:\n Image 1: 0.4079\n Image 2: 0.5921\n"
)
SIDEWAYS = "Image 1 is better."


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("cat (animal): 1\nred (attribute): 0\nFinal Score: 3.5", 3.5),
        ("The 3 cats are there, 2 of 4 legs are not. Final Score: 4.\n", 4),
        ("**Final Score:** 1\r\nThank you for the 5 minutes.", 1),
        ("Final Score: 5", 5),
    ],
)
def test_a_final_score_is_read(text, score):
    assert read_final_score(text) == (score,)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "the answer '' has 'Final Score:' 0 times"),
        ("I would give it 4 out of 5.", "0 times"),
        ("Final Score: 4\nFinal Score: 4", "2 times"),
        ('The sign says "Final Score: 5". Final Score: 2', "2 times"),
        ("Final Score: 0", "has 0 for 'Final Score'"),
        ("Final Score: 5.01", "goes from 1 to 5"),
        ("Final Score: 85", "goes from 1 to 5"),
        (f"Final Score: {'9' * 400}", "goes from 1 to 5"),
        ("Final Score: -3", "no number alone"),
        ("Final Score: 4/10", "no number alone"),
        ("Final Score: 4 or 5", "no number alone"),
        ("Final Score: 3,5", "no number alone"),
        ("Final Score: 3e0", "no number alone"),
        ("Final Score: ４", "no number alone"),
        ("Final Score: ٤", "no number alone"),
        ("Final Score: nan", "no number alone"),
        ("Final Score: four", "no number alone"),
        ("Final Score:\n4", "no number alone"),
        ("Final Score: ", "no number alone"),
        ("semiFinal Score: 4", "0 times"),
    ],
)
def test_what_is_no_final_score_is_refused(text, reason):
    with pytest.raises(AnswerError, match=reason):
        read_final_score(text)


def test_axes_are_read():
    assert read_axes(GOOD_AXES) == (2.694700002670288, 2.3715, 2.8025)
    words = 'Word-wise Scores: [["cat", 0.2], ["[No_mistakes]", 0.9]]\n\n'  # of version 1.5
    assert read_axes(words + GOOD_AXES.replace(" (1-5)", "")) == read_axes(GOOD_AXES)
    first = "the answer 'Alignment Score"
    for bad, reason in [
        (GOOD_AXES.replace("2.8025", "5.5"), "has 5.5 for 'Style Score'"),
        (GOOD_AXES.replace("Style Score (1-5): 2.8025", ""), "'Style Score:' 0 times"),
        (GOOD_AXES + GOOD_AXES, "'Alignment Score:' 2 times"),
        (GOOD_AXES.replace("2.3715", "2.3715 (1-5)"), "no number alone behind 'Coherence Score:'"),
        (GOOD_AXES.replace("(1-5)", "(1-10)"), "0 times"),
    ]:
        with pytest.raises(AnswerError) as caught:
            read_axes(bad)
        assert str(caught.value).startswith(first)
        assert reason in str(caught.value)


def test_shares_of_a_pair_are_read():
    assert read_pair_axes(GOOD_PAIR) == pytest.approx((0.4357, 0.418, 0.4079), abs=1e-6)
    assert read_pair_axes(GOOD_PAIR.replace("0.418", "1").replace("0.582", "0"))[1] == 1
    for bad, reason in [
        ("", "0 times"),
        (GOOD_PAIR.replace("0.418", "0.618"), "0.618 and 0.582 for 'Coherence Score'"),
        (GOOD_PAIR.replace("0.418", "1.418").replace("0.582", "-0.418"), "no shares"),
        (GOOD_PAIR.replace("0.418", "1.005").replace("0.582", "0.0"), "which share 1"),
        (GOOD_PAIR.replace(" Image 2: 0.5921", ""), "no shares of both images behind 'Style Score:'"),
        (GOOD_PAIR.replace("Image 1: 0.4079\n Image 2: 0.5921", "Image 2: 0.5\n Image 1: 0.5"), "no shares"),
        (GOOD_PAIR + GOOD_PAIR, "2 times"),
    ]:
        with pytest.raises(AnswerError, match=reason.replace("(", r"\(")):
            read_pair_axes(bad)


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("Image 1 is better than Image 2.", 1),
        ("Image 2 is better", 0),
        ("Both images are equally good.", 0.5),
        ("Image 1 shows 3 cats. Image 2 is better in style.\n**Conclusion:** Image 1 is better than Image 2.", 1),
        ('They differ.\n"Image 2 is better than Image 1."', 0),
        ("Image 2 is better. I say it again: Image 2 is better than Image 1.", 0),
    ],
)
def test_a_verdict_is_read(text, share):
    assert read_verdict(text) == (share,)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1",
        "Image 1 is better than Image 1.",
        "Image 1 is better. Image 2 is better.",
        "I do not think that Image 1 is better.",
        "Some say: Image 1 is better. But Image 2 is better.",
        "Image 1 is better than Image 2 in style.",
        "Image 1 is better than Image 2. Both images are equally good.",
        "Image １ is better.",
        "image 1 is better.",
    ],
)
def test_what_is_no_verdict_is_refused(text):
    with pytest.raises(AnswerError, match="no clear verdict"):
        read_verdict(text)


class Writer(Judge):
    """Writes what a function makes of its question."""

    name = "writer"

    def __init__(self, text):
        self.text, self.asked = text, []

    def write(self, question, max_tokens):
        self.asked.append((question, max_tokens))
        return self.text(*[round(float(image.mean()), 2) for image in question.images])


def images(*light):
    return torch.tensor(light)[:, None, None, None].expand(-1, 3, 4, 4).contiguous()


def test_a_rating_that_cannot_be_read_is_no_zero():
    def text(light):
        if light == 0.5:
            raise RuntimeError("out of ink")
        return GOOD_AXES if light < 0.5 else "A fine picture, I give it 4."

    judge = Writer(text)
    score = WrittenRating(judge, AXES, principle="Be kind.")(images(0.1, 0.5, 0.9), ["a cat"] * 3)
    assert score.valid.tolist() == [True, False, False]
    assert score.value[0].item() == pytest.approx((2.6947 + 2.3715 + 2.8025) / 3)
    assert math.isnan(score.value[2])
    assert score.reasons[1] == "RuntimeError: out of ink"
    assert score.reasons[2].startswith("the answer 'A fine picture, I give it 4.' has 'Alignment Score:' 0 times")
    question, max_tokens = judge.asked[0]
    assert question.text.startswith("Judge by this principle alone: Be kind.\n\n")
    assert question.text.endswith("Text Caption: [a cat]")
    assert max_tokens == 1024


def test_one_axis_alone():
    style = WrittenRating(Writer(lambda light: GOOD_AXES), AXES, axis="style", question="Rate it.")
    assert style(images(0.1), ["x"]).value.item() == pytest.approx(2.8025)
    assert style.needs == ()
    with pytest.raises(ValueError, match="axis is 'beauty': use mean or one of alignment"):
        WrittenRating(Writer(None), AXES, axis="beauty")
    final = WrittenRating(Writer(lambda light: "Final Score: 2"), FINAL_SCORE)
    assert (final(images(0.1), ["x"]).value.item(), final.needs) == (2.0, ("prompt",))


def test_verdicts_become_win_rates_in_both_orders():
    def brighter(first, second):
        return "Both images are equally good." if first == second else f"Image {1 + (second > first)} is better."

    judge = WrittenPairs(Writer(brighter), VERDICT)
    score = PairwiseJudge(judge, VERDICT.question)(images(0.2, 0.8, 0.8), ["a"] * 3)
    assert score.value.tolist() == [0.0, 0.75, 0.75]
    first = PairwiseJudge(WrittenPairs(Writer(lambda *_: SIDEWAYS), VERDICT))  # whatever the pictures
    assert first(images(0.2, 0.8), ["a"] * 2).value.tolist() == [0.5, 0.5]
    silent = PairwiseJudge(WrittenPairs(Writer(lambda *_: "Hm."), VERDICT))(images(0.2, 0.8), ["a"] * 2)
    assert not silent.valid.any()
    assert "the answer 'Hm.' has no clear verdict" in silent.reasons[0]
    with pytest.raises(ValueError, match="knows 1 and 2 only"):
        judge.answers([], ("yes", "no"))


def test_shares_become_win_rates():
    def share(first, second):
        x = 0.5 + (first - second) / 2 + 0.05  # it likes first places
        return "\n".join(
            f"{axis} Score:\n Image 1: {x}\n Image 2: {1 - x}" for axis in ("Alignment", "Coherence", "Style")
        )

    reward = PairwiseJudge(WrittenPairs(Writer(share), PAIR_AXES, axis="coherence"), PAIR_AXES.question)
    torch.testing.assert_close(reward(images(0.2, 0.6), ["a"] * 2).value, torch.tensor([0.3, 0.7]))


@pytest.fixture
def stub():
    server = Stub()
    yield server
    server.close()


def test_a_server_writes_and_unread_answers_are_asked_again(stub, tmp_path):
    pytest.importorskip("openai")
    texts = iter(["Final Score: 4.5", "It is good.", "Final Score: 3"])

    def answer(request, headers):
        assert "logprobs" not in request
        assert (request["max_tokens"], request["temperature"]) == (77, 0.0)
        done = completion(next(texts), None)
        done["choices"][0]["finish_reason"] = "stop"
        return 200, {}, done

    stub.answer = answer
    judge = JudgeServer("stub", stub.url, cache=tmp_path, concurrency=1)
    reward = WrittenRating(judge, FINAL_SCORE, max_tokens=77)
    score = reward(images(0.2, 0.8), ["a"] * 2)
    assert score.value[0] == 4.5
    assert score.reasons == {1: "the answer 'It is good.' has 'Final Score:' 0 times, not once"}
    assert reward(images(0.2, 0.8), ["a"] * 2).value.tolist() == [4.5, 3.0]
    assert len(stub.requests) == 3


def test_an_answer_of_a_server_that_is_cut_off_has_failed(stub):
    pytest.importorskip("openai")
    stub.answer = lambda request, headers: (200, {}, completion("Final Score: 4", None))  # of 4.5
    score = WrittenRating(JudgeServer("stub", stub.url), FINAL_SCORE, max_tokens=5)(images(0.2), ["a"])
    assert score.reasons == {0: "the answer 'Final Score: 4' is not at its end after 5 tokens"}


def test_a_local_model_writes_what_transformers_generates(tmp_path):
    from transformers import AutoModelForImageTextToText

    folder = save_vlm(tmp_path)
    judge = LocalVLM(folder)
    question = Question((torch.rand(3, 56, 84, generator=torch.Generator().manual_seed(0)),), "Is it good?")
    with pytest.raises(AnswerError, match="is not at its end after 6 tokens"):  # it knows no word for the end
        judge.write(question, 6)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    inputs, truth = judge._inputs([question]), []
    with torch.no_grad():  # one token after the other, without a cache
        for _ in range(6):
            token = model(**inputs, use_cache=False).logits[:, -1].argmax(dim=1, keepdim=True)
            truth.append(token.item())
            inputs["input_ids"] = torch.cat([inputs["input_ids"], token], dim=1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 1))
    judge.model.generation_config.eos_token_id = truth[3]  # so that it ends
    stop = truth.index(truth[3]) + 1
    assert judge.write(question, 6) == judge.processor.tokenizer.decode(truth[:stop])
    judge.model.generation_config.do_sample = True  # as Qwen's own settings have it
    assert judge.write(question, 6) == judge.processor.tokenizer.decode(truth[:stop])


def test_recipes(monkeypatch):
    pytest.importorskip("openai")
    shipped = rewards.load("unified-reward")
    assert isinstance(shipped, WrittenRating)
    assert (shipped.form, shipped.axis) == (AXES, "mean")
    facts = {"name": "mine", "scale": "1 to 5", "licence": "MIT", "source": "me"}
    facts |= {"server": {"base_url": "http://localhost:8000/v1", "model": "m"}}
    final = rewards.load(facts | {"type": "unified_reward", "form": "final-score", "question": "How good?"})
    assert (final.form, final.question, final.name) == (FINAL_SCORE, "How good?", "mine")
    pairs = rewards.load(facts | {"type": "unified_reward_pairs", "axis": "style", "max_tokens": 9})
    assert isinstance(pairs, PairwiseJudge)
    assert (pairs.judge.form, pairs.judge.axis, pairs.judge.max_tokens) == (PAIR_AXES, "style", 9)
    assert (pairs.question, pairs.name) == (PAIR_AXES.question, "mine")
    verdict = rewards.load(facts | {"type": "unified_reward_pairs", "form": "verdict"})
    assert (verdict.judge.form, verdict.question) == (VERDICT, VERDICT.question)
