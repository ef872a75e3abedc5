"""What is read of a Qwen-VL repository beside its weights: tokenizer, image processor, chat template."""

from __future__ import annotations

from typing import Any

from diffalign._compat import ensure_torchvision


class QwenProcessor:
    """In the place of transformers' processor, which also makes that of videos and for it needs torchvision.

    Args:
        path: a local folder or hub id.
        revision: of the hub repository.

    Raises:
        ValueError: there is no chat template, or the tokenizer does not know the token of an image.
    """

    image_token, video_token = "<|image_pad|>", "<|video_pad|>"

    def __init__(self, path: str, revision: str | None) -> None:
        ensure_torchvision()
        from transformers import AutoImageProcessor, AutoTokenizer, ProcessorMixin

        self.tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
        self.image_processor = AutoImageProcessor.from_pretrained(path, revision=revision)
        given, _ = ProcessorMixin.get_processor_dict(path, revision=revision)
        self.chat_template = given.get("chat_template") or self.tokenizer.chat_template
        if not self.chat_template:
            raise ValueError(f"{path} has no chat template: it is not a model that answers, or lacks a file.")
        self.image_token_id = self.tokenizer.convert_tokens_to_ids(self.image_token)
        if self.image_token_id in (None, self.tokenizer.unk_token_id):
            raise ValueError(f"the tokenizer of {path} does not know {self.image_token}: it is no Qwen-VL model's.")

    def apply_chat_template(self, messages: list[dict[str, Any]], **settings: Any) -> str:
        """The text of a conversation."""
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self.chat_template, tokenize=False, **settings
        )


def load_processor(path: str, revision: str | None) -> Any:
    """A `QwenProcessor` where the image processor is one of Qwen-VL, else what transformers has for the family."""
    ensure_torchvision()
    from transformers import AutoProcessor
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        config, _ = ImageProcessingMixin.get_image_processor_dict(path, revision=revision)
    except OSError:  # no such file; transformers' own loader says what is missing
        config = {}
    if str(config.get("image_processor_type")).startswith("Qwen2VLImageProcessor"):
        return QwenProcessor(path, revision)
    return AutoProcessor.from_pretrained(path, revision=revision)
