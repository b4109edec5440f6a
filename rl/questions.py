"""This file defines the Question, a task before it is rendered for a model, and the stream of them that a level is."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import msgspec

from rl.trajectory import Message, TextPart


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """One task. key is unique within its source and level and names the same task in any run.

    text is what the task says, without system prompt and instruction: training and held-out sides never share one.
    """

    key: str
    text: str
    messages: tuple[Message, ...]
    reference: str | None
    columns: dict[str, Any]


class KnownPrompt(msgspec.Struct, frozen=True):
    """A prompt of a finite source. passed and answers are what `rl screen` found of it; none where it was not there."""

    key: str
    passed: float = 0.0
    answers: float = 0.0


class QuestionStream(Protocol):
    """The questions of one source and level."""

    def training(self, cursor: int) -> tuple[Question, int]:
        """The first training question at or after `cursor`, and the cursor of the one that follows."""
        ...

    def held_out(self) -> Iterator[Question]:
        """Held-out questions in a fixed order, the same for every seed; it ends where there are no more."""
        ...


def digest_of(question: Question) -> str:
    """What tells a question from another that took its key, such as a line number, when the data were edited."""
    return f"{stable_number('question', question.text, bits=64):016x}"


def user_message(text: str, instruction: str) -> Message:
    """A user's turn; the instruction stands on a line of its own below the question."""
    return Message("user", (TextPart(f"{text}\n{instruction}" if instruction else text),))


def stable_number(*parts: object, bits: int = 32) -> int:
    """A number below 2**bits that depends on the parts alone, in any process."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % (1 << bits)


def plain(value: Any) -> Any:
    """The same content in types that survive JSON and msgpack: tuples as lists, keys as text, huge integers as text.

    Rewards thus see in the run what they see again when an archived group is replayed.
    """
    if value is None or type(value) in (bool, float, str):
        return value
    if type(value) is int:
        return value if -(1 << 63) <= value < 1 << 64 else str(value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return str(value)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a wrong name: the closest known ones, or all where none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"
