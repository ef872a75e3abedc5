"""A vision-language model of transformers on this machine, asked by one forward pass."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from diffalign._compat import ensure_torchvision
from diffalign.media import to_pil
from diffalign.rewards.vlm.judge import AnswerError, Judge, Question
from diffalign.rewards.vlm.qwen_processor import QwenProcessor, load_processor
from diffalign.rewards.weights import pretrained


class LocalVLM(Judge):
    """Any decoder-only `AutoModelForImageTextToText`; differentiable for Qwen2-VL, Qwen2.5-VL and Qwen3-VL.

    The chat template is that of the checkpoint, without thinking, and the answer is the distribution of the first token
    after it. Images are rounded to 8 bits, as for a saved file. Those of the Qwen-VL family become patches in torch, so
    that gradients reach them, straight through the rounding; other families' go through their own processor.

    Rows are padded at the end and read at their last own token, which no padding can reach through a causal mask, so
    that an answer does not depend on the other rows, up to the rounding of batched kernels.

    Args:
        path: a local folder or hub id with safetensors, tokenizer, processor and chat template.
        name: default: the last part of the path.
        revision: of the hub repository.
        dtype: of the weights. Log-probabilities are taken in float32 at least.
        batch_size: questions in one forward pass; it does not change the result.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        name: str | None = None,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 8,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: at least one question is asked at once.")
        self.name = name or Path(path).name
        self.batch_size = batch_size
        self.model = _load_model(str(path), revision, dtype)
        self.processor = load_processor(str(path), revision)
        self.processor.tokenizer.padding_side = "right"
        self.differentiable = isinstance(self.processor, QwenProcessor)
        self._parameters = inspect.signature(self.model.forward).parameters

    def to(self, device: torch.device | str) -> Self:
        """Moves the weights."""
        self.model.to(device)
        return self

    def log_probs(self, questions: Sequence[Question], words: Sequence[str]) -> Tensor:
        """(Q, W), with gradients to the images where ``differentiable``. ValueError: a word is no token."""
        tokens = [self.word_tokens(word) for word in words]
        rows = []
        for start in range(0, len(questions), self.batch_size):
            logits = self._last_logits(questions[start : start + self.batch_size])
            log_p = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(dim=1)
            rows.append(torch.stack([log_p[:, ids].logsumexp(dim=1) for ids in tokens], dim=1))
        return torch.cat(rows)

    def write(self, question: Question, max_tokens: int) -> str:
        """The greedy answer, by ``generate`` with the checkpoint's own settings but for sampling.

        One question at a time: rows of unlike lengths would need padding in front of them, and their answers would
        depend on each other.

        Raises:
            AnswerError: it is not at its end after ``max_tokens``.
        """
        inputs = {key: value.to(self.model.device) for key, value in self._inputs([question]).items()}
        settings = copy.deepcopy(self.model.generation_config)
        settings.update(do_sample=False, temperature=None, top_p=None, top_k=None, max_new_tokens=max_tokens)
        with torch.no_grad(), torch.autocast(self.model.device.type, enabled=False):
            tokens = self.model.generate(**inputs, generation_config=settings)[0, inputs["input_ids"].shape[1] :]
        text = self.processor.tokenizer.decode(tokens, skip_special_tokens=True)
        last = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
        if len(tokens) >= max_tokens and tokens[-1].item() not in last:
            raise AnswerError(f"the answer {text[:80]!r} is not at its end after {max_tokens} tokens")
        return text

    def word_tokens(self, word: str) -> list[int]:
        """Ids of the tokens that are this word in any case, with or without white space around it."""
        found = [index for index, text in enumerate(self._token_texts) if text == word.casefold()]
        if not found:
            raise ValueError(f"the tokenizer of {self.name} has no token {word!r}: ask for another word.")
        return found

    @cached_property
    def _token_texts(self) -> list[str]:
        """Of each token that the model can answer with, its text in lower case and without white space around it."""
        tokenizer = self.processor.tokenizer
        known = min(len(tokenizer), self.model.get_output_embeddings().weight.shape[0])
        return [text.strip().casefold() for text in tokenizer.batch_decode([[index] for index in range(known)])]

    def _last_logits(self, questions: Sequence[Question]) -> Tensor:
        """(Q, V) logits of the first token of each answer."""
        inputs = {key: value.to(self.model.device) for key, value in self._inputs(questions).items()}
        last = inputs["attention_mask"].sum(dim=1) - 1
        rows = torch.arange(len(questions), device=last.device)
        if "logits_to_keep" in self._parameters:  # a vocabulary's worth of logits for every image token is gigabytes
            kept, place = last.unique(return_inverse=True)
            inputs["logits_to_keep"] = kept
        else:
            place = last
        with torch.autocast(self.model.device.type, enabled=False):
            return self.model(**inputs, use_cache=False).logits[rows, place]

    def _inputs(self, questions: Sequence[Question]) -> dict[str, Tensor]:
        texts = [self._text(question) for question in questions]
        if not self.differentiable:
            images = [[to_pil(image[None])[0] for image in question.images] for question in questions]
            return dict(self.processor(text=texts, images=images, padding=True, return_tensors="pt"))
        figures = [[self.processor.patches(image) for image in question.images] for question in questions]
        inputs = self.processor.inputs(texts, figures)
        if "mm_token_type_ids" in self._parameters:
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == self.processor.image_token_id).int()
        return inputs

    def _text(self, question: Question) -> str:
        content = [{"type": "image"} for _ in question.images] + [{"type": "text", "text": question.text}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, enable_thinking=False
        )
        if text.rstrip().endswith("<think>"):
            raise ValueError(
                f"{self.name} thinks before it answers, and its chat template cannot turn that off: take a model "
                "that answers at once, such as the -Instruct of the same family."
            )
        return text


def _load_model(path: str, revision: str | None, dtype: torch.dtype) -> Any:
    ensure_torchvision()
    from transformers import AutoModelForImageTextToText

    model = pretrained(AutoModelForImageTextToText, path, revision, dtype)
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{path} is a {type(model).__name__} with an encoder and a decoder: take a decoder-only model."
        )
    return model
