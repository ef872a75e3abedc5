"""Question templates as data, and how a template, a prompt and a principle become the text that a judge reads."""

from __future__ import annotations

from string import Formatter

YES_NO = {
    # Lin et al. (2024), arXiv:2404.01291, section 3; t2v_metrics 3.0, for CLIP-FlanT5.
    "vqascore": 'Does this figure show "{prompt}"? Please answer yes or no.',
    # The same question as t2v_metrics 3.1 puts it to Qwen2.5-VL.
    "vqascore-qwen": 'Does this figure show "{prompt}"? Please answer Yes or No.',
}
"""Questions for `YesLogit`, by name."""

RATING = (
    'On a scale from 1 (bad) to 5 (excellent), how well does this image show "{prompt}"? '
    "Answer with one digit from 1 to 5 and nothing else."
)
"""Our own question for `Rating`."""

PAIRWISE = (
    'Which of these two images shows "{prompt}" better, the first or the second? '
    "Answer with 1 for the first or 2 for the second and nothing else."
)
"""Our own question for `PairwiseJudge`."""


def check_template(question: str, known: tuple[str, ...] = ("prompt",)) -> None:
    """ValueError where a template has another field than those."""
    try:
        fields = {name for _, name, _, _ in Formatter().parse(question) if name is not None}
    except ValueError as error:
        raise ValueError(f"question {question!r} is no template: {error}; double the braces that are text.") from None
    if unknown := sorted(fields - set(known)):
        only = "is the only one" if len(known) == 1 else "are the only ones"
        raise ValueError(
            f"question {question!r} has the field {unknown[0]!r}: {', '.join(f'{{{name}}}' for name in known)} {only}."
        )


def filled(question: str, prompt: str, principle: str | None = None, **more: str) -> str:
    """The text of a question about an image of ``prompt``; ``more`` are the other fields of its template.

    A principle, the standard to judge by, is an argument of the question as in RewardAnything (Yu et al., 2025,
    arXiv:2506.03637), which judges text; the words around it are ours.
    """
    text = question.format(prompt=prompt, **more)
    return text if principle is None else f"Judge by this principle alone: {principle.strip()}\n\n{text}"
