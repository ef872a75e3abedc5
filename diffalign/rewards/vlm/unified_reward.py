"""The forms in which UnifiedReward answers, and readers of them that refuse what they cannot be sure of.

Wang et al. (2025), arXiv:2503.05236; https://github.com/CodeGoat24/UnifiedReward. The forms of the answers are those of
its inference scripts. The questions are in our own words, around the published names of the axes and the published
form: its authors say that the models are not bound to one wording. Whoever wants theirs gives it as ``question``.

Departures: the mean of the three axes is ours, the scripts print them. The published evaluation looks for a verdict
anywhere in the text; here it must be a sentence of its own and the only one. Images are sent without loss, not as JPEG.
"""

from __future__ import annotations

import re

from diffalign.rewards.vlm.judge import AnswerError
from diffalign.rewards.vlm.written import AnswerForm

_AXES = ("alignment", "coherence", "style")
_MEANING = (
    "alignment (does the picture show what the caption says), coherence (is it free of glitches and distorted "
    "objects) and style (is it pleasing to look at, whatever the caption says)"
)
_NUMBER = r"[0-9]+(?:\.[0-9]+)?"  # ASCII only, unlike \d and float()
_SUM = 0.01  # the most by which two shares may miss a sum of 1: they come as rounded decimals
_VERDICTS = {"Image 1": 1.0, "Image 2": 0.0, "Both": 0.5}
_MENTION = re.compile(r"(Image 1|Image 2) is better|(Both) images are equally good")
_SENTENCE = re.compile(
    r"(?:^|[.!?:]\s+|\n\s*)[\"']?"
    r"(Image 1 is better(?: than Image 2)?|Image 2 is better(?: than Image 1)?|Both images are equally good)"
    r"(?=\s*(?:\.|$))"
)


def read_final_score(text: str) -> tuple[float]:
    """The number behind "Final Score:", 1 to 5, alone on the rest of its line; AnswerError otherwise."""
    return (_rating(text, "Final Score"),)


def read_axes(text: str) -> tuple[float, float, float]:
    """The ratings from 1 to 5 behind "Alignment Score (1-5):", and so on; AnswerError otherwise."""
    alignment, coherence, style = (_rating(text, f"{axis.capitalize()} Score", r"(?: \(1-5\))?") for axis in _AXES)
    return alignment, coherence, style


def read_pair_axes(text: str) -> tuple[float, float, float]:
    """Image 1's share of alignment, coherence and style, each in [0, 1]; AnswerError if two shares sum to no 1."""
    alignment, coherence, style = (_share(text, f"{axis.capitalize()} Score") for axis in _AXES)
    return alignment, coherence, style


def read_verdict(text: str) -> tuple[float]:
    """1 where a sentence says that Image 1 is better (than Image 2), 0 for the reverse, 1/2 for equally good images.

    AnswerError where no sentence says so, where sentences say different things, or where the last mention of a verdict
    is no such sentence ("but Image 2 is better in style").
    """
    plain = _plain(text)
    sentences, mentions = list(_SENTENCE.finditer(plain)), list(_MENTION.finditer(plain))
    said = {_VERDICTS[mention[1] or mention[2]] for mention in mentions if _begins(mention, sentences)}
    if len(said) != 1 or not _begins(mentions[-1], sentences):
        raise AnswerError(f"the answer {text[:80]!r} has no clear verdict of which image is better")
    return (said.pop(),)


def _begins(mention: re.Match, sentences: list[re.Match]) -> bool:
    return any(mention.start() == sentence.start(1) for sentence in sentences)


def _plain(text: str) -> str:
    """Without the stars by which chat models make words bold."""
    return text.replace("*", "").strip()


def _once(text: str, label: str, between: str = "") -> str:
    """What follows the label and its colon, which must be there once."""
    parts = re.split(rf"(?<!\w){label}{between}:", _plain(text))
    if len(parts) != 2:
        raise AnswerError(f"the answer {text[:80]!r} has '{label}:' {len(parts) - 1} times, not once")
    return parts[1]


def _rating(text: str, label: str, between: str = "") -> float:
    line = _once(text, label, between).split("\n")[0]
    number = re.fullmatch(rf"[ \t]*({_NUMBER})\.?[ \t\r]*", line)
    if number is None:
        raise AnswerError(f"the answer {text[:80]!r} has no number alone behind '{label}:', but {line[:40]!r}")
    value = float(number[1])
    if not 1 <= value <= 5:
        raise AnswerError(f"the answer {text[:80]!r} has {value:g} for '{label}', which goes from 1 to 5")
    return value


def _share(text: str, label: str) -> float:
    rest = _once(text, label)
    shares = re.match(rf"\s*Image 1:[ \t]*({_NUMBER})[ \t\r]*\n\s*Image 2:[ \t]*({_NUMBER})[ \t\r]*(?:\n|$)", rest)
    if shares is None:
        raise AnswerError(f"the answer {text[:80]!r} has no shares of both images behind '{label}:'")
    first, second = float(shares[1]), float(shares[2])
    if abs(first + second - 1) > _SUM or first > 1 or second > 1:
        raise AnswerError(f"the answer {text[:80]!r} has {first:g} and {second:g} for '{label}', which share 1")
    return first / (first + second)


FINAL_SCORE = AnswerForm(
    question=(
        "The picture was made from a caption. Judge how well it agrees with the caption, in its objects, their "
        "attributes and their relations, and how good it is as a picture: clear, detailed, right in colour, pleasing. "
        "List the elements of the caption, each as 'element (type): value' with value 0 if it is not shown and 1 if "
        "it is. Then give a score from 1 to 5 behind 'Final Score:', on the last line.\nText Caption: [{prompt}]"
    ),
    axes=("score",),
    parse=read_final_score,
)
"""UnifiedReward 1.0, of one image: a list of what is there, and a score from 1 to 5."""

AXES = AnswerForm(
    question=(
        f"The picture was made from a caption. Rate it from 1 to 5 on {_MEANING}. Answer in this form:\n\n"
        "Alignment Score (1-5): X\nCoherence Score (1-5): Y\nStyle Score (1-5): Z\n\nText Caption: [{prompt}]"
    ),
    axes=_AXES,
    parse=read_axes,
)
"""UnifiedReward 2.0, of one image: three ratings from 1 to 5."""

VERDICT = AnswerForm(
    question=(
        "The two pictures were made from one caption. Judge which agrees better with it, in its objects, their "
        "attributes and their relations, and is better as a picture: clear, detailed, right in colour, pleasing. "
        'Conclude with one of "Image 1 is better than Image 2.", "Image 2 is better than Image 1." and '
        '"Both images are equally good."\nText Caption: [{prompt}]'
    ),
    axes=("verdict",),
    parse=read_verdict,
)
"""UnifiedReward 1.0, of two images: which is better."""

PAIR_AXES = AnswerForm(
    question=(
        f"The two pictures were made from one caption. Compare them on {_MEANING}. On each, divide a score of 1.0 "
        "between Image 1 and Image 2: the better has more. Answer in this form:\n\n"
        "Alignment Score:\n Image 1: X\n Image 2: Y\n\nCoherence Score:\n Image 1: X\n Image 2: Y\n\n"
        "Style Score:\n Image 1: X\n Image 2: Y\n\nText Caption: [{prompt}]"
    ),
    axes=_AXES,
    parse=read_pair_axes,
)
"""UnifiedReward 2.0, of two images: how they share 1 on three axes."""

RATINGS = {"final-score": FINAL_SCORE, "axes": AXES}
"""Forms for `WrittenRating`, by name."""

PAIRS = {"verdict": VERDICT, "axes": PAIR_AXES}
"""Forms for `WrittenPairs`, by name."""
