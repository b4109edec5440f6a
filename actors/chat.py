"""This file turns a conversation into the token ids that the model was trained to answer."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import AutoTokenizer

from rl.trajectory import Message


class ChatTokenizer:
    """A model's tokenizer with its chat template."""

    def __init__(self, model_dir: str, chat_template: str | None = None) -> None:
        """model_dir is a directory or a Hugging Face id; chat_template (Jinja) takes the place of the model's own."""
        self._tokenizer = AutoTokenizer.from_pretrained(model_dir)
        if chat_template is not None:
            self._tokenizer.chat_template = chat_template
        if not self._tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer of {model_dir} has no chat template, so a conversation has no defined token ids; "
                "take an instruction-tuned model, or add chat_template.jinja to its directory"
            )

    def render(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Token ids [P] of the conversation, up to where the model's answer begins."""
        turns = [{"role": message.role, "content": message.text} for message in messages]
        text = self._tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))  # the template writes its own
