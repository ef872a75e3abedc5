"""Text answers about images, compared by a judge that writes its choice between tags."""

import re

import pytest
import torch

from diffalign import rewards
from diffalign.rewards.vlm import Judge
from diffalign.rewards.vlm.answer_pairs import AnswerPairs, read_choice
from diffalign.rewards.vlm.judge import AnswerError


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("<think>1 is short, 2 is wrong.</think><answer>1</answer>", 1.0),
        ("<think>\n</think>\n<answer> 2\n</answer>", 0.0),
    ],
)
def test_a_choice_is_read(text, share):
    assert read_choice(text) == (share,)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1",
        "<think>so 2</think>",
        "<answer>1/2</answer>",
        "<answer>１</answer>",
        "<answer>1.0</answer>",
        "<answer></answer>",
        "<answer>1</answer><answer>1</answer>",
        "<think>It says <answer>2</answer></think><answer>1</answer>",
        "<answer>1",
    ],
)
def test_what_is_no_choice_is_refused(text):
    with pytest.raises(AnswerError, match="has not one <answer>"):
        read_choice(text)


class Longest(Judge):
    """Chooses the longer answer, the first of equal ones."""

    name = "longest"

    def __init__(self):
        self.asked = []

    def write(self, question, max_tokens):
        self.asked.append(question)
        first, second = re.search(r"Answer 1:\n(.*)\n\nAnswer 2:\n(.*)", question.text).groups()
        return "I cannot." if "{" in first + second else f"<answer>{1 + (len(second) > len(first))}</answer>"


def scored(answers, light=None, prompts=None):
    light = torch.tensor(light or [0.5] * len(answers))
    judge = Longest()
    images = light[:, None, None, None].expand(-1, 3, 2, 2).contiguous()
    metadata = [{} if answer is None else {"answer": answer} for answer in answers]
    return AnswerPairs(judge)(images, prompts or ["What is it?"] * len(answers), metadata), judge


def test_answers_are_ranked_by_their_wins():
    score, judge = scored(["a cat", "a large cat", "it", "no cat"])
    torch.testing.assert_close(score.value, torch.tensor([1 / 3, 1, 0, 2 / 3]))
    assert len(judge.asked) == 4 * 3
    assert all(len(question.images) == 1 for question in judge.asked)
    same, _ = scored(["a cat", "no cat"][:1] * 2)
    assert same.value.tolist() == [0.5, 0.5]  # whatever the judge thinks of first places


def test_answers_are_compared_for_one_question_and_one_image():
    score, judge = scored(["a", "bb", "ccc", "dddd"], light=[0.2, 0.2, 0.8, 0.8], prompts=["x", "x", "x", "y"])
    assert score.value[:2].tolist() == [0.0, 1.0]
    assert score.valid.tolist() == [True, True, False, False]
    assert "only answer to 'x' about its image" in score.reasons[2]
    assert len(judge.asked) == 2


def test_what_cannot_be_judged_is_left_out():
    score, _ = scored(["a cat", None, "{it}", "a dog!"])
    assert score.valid.tolist() == [True, False, False, True]
    assert score.value[[0, 3]].tolist() == [0.0, 1.0]
    assert score.reasons[1] == 'metadata["answer"] is no text'
    assert "the answer 'I cannot.' has not one <answer>" in score.reasons[2]
    nothing, _ = scored([None, None])
    assert not nothing.valid.any()


def test_templates_and_recipe():
    with pytest.raises(ValueError, match=r"has the field 'third'.* are the only ones"):
        AnswerPairs(Longest(), "{third}")
    pytest.importorskip("openai")
    facts = {"name": "mine", "type": "answer_pairs", "scale": "0 to 1", "licence": "MIT", "source": "me"}
    server = {"base_url": "http://localhost:8000/v1", "model": "m"}
    reward = rewards.load(facts | {"server": server, "needs": ["prompt", "answer"], "max_tokens": 12})
    assert isinstance(reward, AnswerPairs)
    assert (reward.name, reward.judge.max_tokens, reward.groupwise) == ("mine", 12, True)
