"""This file turns finished answers into text, once and off the event loop, as vLLM would have token by token.

vLLM decodes each token when it comes, for those who read along; here nobody does before a group is judged. Decoding an
answer whole gives the same text but for its end: where an answer stops within a character, vLLM writes nothing of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # how a decoder writes the bytes of a character that is not whole


class Detokeniser:
    """A model's tokenizer, as far as it writes. Special tokens are left out of the text, as by vLLM's defaults."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    async def texts(self, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> list[str]:
        """The text of each answer to a prompt; an answer's end-of-sequence token is not among its tokens."""
        return await asyncio.to_thread(lambda: [self.text(prompt, answer) for answer in answers])

    def text(self, prompt: Sequence[int], answer: Sequence[int]) -> str:
        """What follows the prompt's text: the first word's space depends on it where a tokenizer writes spaces so."""
        before = self._tokenizer.decode(list(prompt))
        whole = self._tokenizer.decode([*prompt, *answer])
        if whole.startswith(before) and not before.endswith(UNFINISHED) and not whole.endswith(UNFINISHED):
            return whole.removeprefix(before)
        return self._streamed(prompt, answer)

    def _streamed(self, prompt: Sequence[int], answer: Sequence[int]) -> str:
        stream = DecodeStream(ids=list(prompt), skip_special_tokens=True)
        pieces: list[str] = []
        for token in answer:
            try:
                piece = stream.step(self._tokenizer, token)
            except Exception as error:
                if not str(error).startswith("Invalid prefix encountered"):
                    raise
                # The text before changed with what came after; vLLM begins anew there, and forgets it.
                stream = DecodeStream(skip_special_tokens=True)
                piece = stream.step(self._tokenizer, token)
            pieces.append(piece or "")
        return "".join(pieces)
