"""A vision-language model behind any OpenAI-compatible server, such as vLLM, SGLang or `transformers serve`."""

from __future__ import annotations

import base64
import contextlib
import io
import math
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign.media import to_pil
from diffalign.rewards.vlm.cache import AnswerCache, digest, pixel_digest
from diffalign.rewards.vlm.judge import AnswerError, Answers, Judge, Question, Readings

_TOP = 20  # the most that the interface allows
_TEXT_TOKENS = 8  # for a word behind a line break or a mark
_LOG_UNLIKELY = -9999.0  # how OpenAI's servers spell "not known"
_LEAST_MASS = 1e-6  # a sum of rounded probabilities tells no less
_MOST_UNLISTED = 0.01

_Row = list[float] | tuple[float, ...]  # what an answer was read as


class JudgeServer(Judge):
    """Asks by ``chat.completions`` at temperature 0; images travel as PNG in the request, so no pixel changes.

    A request that meets status 408, 409, 429 or 5xx, a time limit or a lost connection is sent again after 0.5, 1, 2, 4
    and then 8 s, or what the server's Retry-After says. A question that fails for good costs its own answer and says
    why; once a server cannot be reached at all, the questions that still wait fail at once. Answers are kept as they
    arrive, so a second run asks what failed and nothing else; failures are not kept.

    Read as "logprobs", one token is asked for, with its 20 most likely alternatives. A word that is not among them
    gets the probability of the least of them, or what they leave, if that is less: a bound that is at most 0.01, or the
    answer has failed. It also has if no word is among them. Read as "text", for a server without log-probabilities,
    the first word of the answer counts as certain.

    Args:
        model: as the server calls it.
        base_url: such as ``http://localhost:8000/v1``.
        api_key_env: environment variable that holds the key; None: the server wants none. The key is neither logged nor
            kept, and is taken out of what a server says.
        read: "logprobs" or "text".
        extra_body: fields added to each request, over its own; vLLM, SGLang and `transformers serve` turn thinking off
            by ``{"chat_template_kwargs": {"enable_thinking": False}}``.
        cache: folder of answers, see `AnswerCache`. A key is the sha256 of pixels, messages, model and settings, not of
            the address.
        concurrency: requests at a time.
        timeout: seconds for one request.
        retries: of one request.
        name: default: the model.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        *,
        api_key_env: str | None = None,
        read: Literal["logprobs", "text"] = "logprobs",
        extra_body: Mapping[str, Any] | None = None,
        cache: str | Path | None = None,
        concurrency: int = 8,
        timeout: float = 120.0,
        retries: int = 5,
        name: str | None = None,
    ) -> None:
        if read not in ("logprobs", "text"):
            raise ValueError(f"read is {read!r}: use logprobs, or text for a server that gives none.")
        if concurrency < 1:
            raise ValueError(f"concurrency is {concurrency}: at least one request is sent at a time.")
        self.name, self.model = name or model, model
        self.base_url, self.concurrency = base_url, concurrency
        self.gives_probabilities = read == "logprobs"
        self.settings: dict[str, Any] = {"temperature": 0.0, "max_tokens": _TEXT_TOKENS}
        if self.gives_probabilities:
            self.settings |= {"max_tokens": 1, "logprobs": True, "top_logprobs": _TOP}
        self.extra_body = dict(extra_body or {})
        self.cache = AnswerCache(cache) if cache is not None else None
        self._client = _client(base_url, _key(api_key_env), timeout, retries)

    def log_probs(self, questions: Sequence[Question], words: Sequence[str]) -> Tensor:
        """(Q, W); RuntimeError with the first reason where a question failed."""
        answers = self.answers(questions, words)
        if answers.reasons:
            raise RuntimeError(next(iter(answers.reasons.values())))
        return answers.log_probs

    def answers(self, questions: Sequence[Question], words: Sequence[str]) -> Answers:
        """Asks ``concurrency`` questions at a time; see `Answers`."""
        told = self._ask_all(questions, self.settings, lambda answer: self._read(answer, words))
        rows = [[math.nan] * len(words) if isinstance(row, str) else row for row in told]
        return Answers(torch.tensor(rows), {i: row for i, row in enumerate(told) if isinstance(row, str)})

    def readings(
        self, questions: Sequence[Question], parse: Callable[[str], tuple[float, ...]], max_tokens: int
    ) -> Readings:
        """Asks ``concurrency`` questions at a time for a text, however ``read`` is set; see `Readings`."""
        settings = {"temperature": 0.0, "max_tokens": max_tokens}
        told = self._ask_all(questions, settings, lambda answer: parse(_whole(answer, max_tokens)))
        numbers = [None if isinstance(row, str) else row for row in told]
        return Readings(numbers, {i: row for i, row in enumerate(told) if isinstance(row, str)})

    def _ask_all(
        self, questions: Sequence[Question], settings: dict[str, Any], read: Callable[[Mapping[str, Any]], _Row]
    ) -> list[_Row | str]:
        """What `read` makes of each answer, or the reason why there is nothing."""
        lost = threading.Event()
        executor = ThreadPoolExecutor(self.concurrency)
        try:
            return list(executor.map(lambda question: self._answer(question, settings, read, lost), questions))
        finally:
            executor.shutdown(cancel_futures=True)  # Ctrl-C waits for the requests under way and sends no other

    def _answer(
        self,
        question: Question,
        settings: dict[str, Any],
        read: Callable[[Mapping[str, Any]], _Row],
        lost: threading.Event,
    ) -> _Row | str:
        try:
            key = self._cache_key(question, settings)
            kept = self.cache.get(key) if self.cache is not None else None
            if kept is not None:
                with contextlib.suppress(Exception):  # of another version, or damaged: asked again
                    return read(kept)
            if lost.is_set():
                return f"not asked, because the server at {self.base_url} cannot be reached"
            answer = self._ask(question, settings)
            row = read(answer)
            if self.cache is not None:
                self.cache.put(key, answer)
            return row
        except Exception as error:
            if _unreachable(error):
                lost.set()
                return f"the server at {self.base_url} cannot be reached: {self._clean(error)}"
            told = "" if isinstance(error, AnswerError) else f"{type(error).__name__}: "
            return told + self._clean(error)

    def _read(self, answer: Mapping[str, Any], words: Sequence[str]) -> list[float]:
        if self.gives_probabilities:
            return listed_log_probs(answer["top"], words)
        return spoken_log_probs(answer["text"], words)

    def _cache_key(self, question: Question, settings: dict[str, Any]) -> str:
        return digest(
            {
                "model": self.model,
                "messages": [{"images": [pixel_digest(image) for image in question.images], "text": question.text}],
                "settings": settings | {"extra_body": self.extra_body},
            }
        )

    def _ask(self, question: Question, settings: dict[str, Any]) -> dict[str, Any]:
        """What is kept: the text, whether it was cut off, and (token, log-probability) of the first token's rivals."""
        content: list[dict] = [{"type": "image_url", "image_url": {"url": png_url(image)}} for image in question.images]
        content.append({"type": "text", "text": question.text})
        reply = self._client.chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": content}],
            extra_body=self.extra_body or None,
            **settings,
        )
        choice = _first_choice(reply)
        answer = {"text": choice.message.content or "", "cut": choice.finish_reason == "length"}
        if settings.get("logprobs"):
            tokens = choice.logprobs.content if choice.logprobs is not None else None
            if not tokens or not tokens[0].top_logprobs:
                raise AnswerError("the server gave no log-probabilities: read its answers as text.")
            answer["top"] = [[token.token, token.logprob] for token in tokens[0].top_logprobs]
        return answer

    def _clean(self, error: Exception) -> str:
        """What went wrong, without the key, which some servers repeat, and without a page of it."""
        return str(error).replace(self._client.api_key, "***")[:500]


def png_url(image: Tensor) -> str:
    """An image (3, H, W) in [0, 1] as the data URL of a PNG."""
    buffer = io.BytesIO()
    to_pil(image[None])[0].save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def listed_log_probs(top: Sequence[Sequence[Any]], words: Sequence[str]) -> list[float]:
    """Log-probability of each word from the most likely tokens, as (token, log-probability); see `JudgeServer`.

    Raises:
        AnswerError: no word is among them, or one that is not could be likely.
    """
    known = [(str(token).strip().casefold(), float(log_p)) for token, log_p in top if log_p > _LOG_UNLIKELY]
    mass = [math.fsum(math.exp(log_p) for token, log_p in known if token == word.casefold()) for word in words]
    listed = ", ".join(repr(token) for token, _ in top[:5])
    if not any(mass):
        raise AnswerError(f"none of {', '.join(words)} is among the {len(top)} most likely tokens ({listed}, ...)")
    left = max(1 - math.fsum(math.exp(log_p) for _, log_p in known), _LEAST_MASS)
    bound = min(left, math.exp(min(log_p for _, log_p in known)))
    if bound > _MOST_UNLISTED and not all(mass):
        absent = words[mass.index(0.0)]
        raise AnswerError(
            f"{absent} is not among the {len(top)} listed tokens ({listed}) and could have p = {bound:.2f}"
        )
    return [math.log(p or bound) for p in mass]


def spoken_log_probs(text: str, words: Sequence[str]) -> list[float]:
    """0 for the word that an answer begins with and -inf for the others; AnswerError where it begins with none."""
    first = re.search(r"\w+", text)
    said = first.group().casefold() if first else ""
    if said not in [word.casefold() for word in words]:
        raise AnswerError(f"the answer {text[:80]!r} begins with none of {', '.join(words)}")
    return [0.0 if word.casefold() == said else -math.inf for word in words]


def _whole(answer: Mapping[str, Any], max_tokens: int) -> str:
    """The text of an answer that came to its end."""
    if answer["cut"]:
        raise AnswerError(f"the answer {answer['text'][:80]!r} is not at its end after {max_tokens} tokens")
    return answer["text"]


def _first_choice(reply: Any) -> Any:
    choices = getattr(reply, "choices", None)  # a page of HTML comes as a string
    if not choices:
        raise AnswerError(f"the server's answer is no chat completion: {str(reply)[:80]!r}")
    return choices[0]


def _key(variable: str | None) -> str:
    if variable is None:
        return "none-needed"
    key = os.environ.get(variable, "")
    if not key:
        raise ValueError(f"the environment variable {variable}, which should hold the API key, is not set.")
    return key


def _client(base_url: str, key: str, timeout: float, retries: int) -> Any:
    try:
        from openai import OpenAI
    except ImportError:
        raise ImportError("a judge behind a server needs the package openai: pip install 'diffalign[judge]'.") from None
    return OpenAI(api_key=key, base_url=base_url, timeout=timeout, max_retries=retries)


def _unreachable(error: Exception) -> bool:
    from openai import APIConnectionError, APITimeoutError

    return isinstance(error, APIConnectionError) and not isinstance(error, APITimeoutError)
