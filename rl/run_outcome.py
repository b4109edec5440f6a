"""This file says how a run ended, in one object that people, schedulers and tests read: outcome.json."""

from __future__ import annotations

import traceback
from typing import Literal

import msgspec

from rl.recorder import RunDirectory, write_atomically

Status = Literal["finished", "stopped", "failed", "refused"]


class FirstError(msgspec.Struct, frozen=True):
    """The failure that came first; what followed from it is in logs/."""

    type: str
    message: str
    where: str
    traceback: str


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """finished: all steps. stopped: asked to, and resumable. failed: first_error says why. refused: bad input."""

    status: Status
    step: int = 0
    summary: str = ""
    first_error: FirstError | None = None

    @classmethod
    def of_error(cls, status: Status, error: BaseException, step: int = 0) -> Outcome:
        """The outcome of an exception; its notes say which part of the run raised it."""
        where = "; ".join(getattr(error, "__notes__", []))
        text = "".join(traceback.format_exception(error))
        remote = getattr(error, "cause", None)  # Ray wraps what an actor raised, and makes its traceback the message
        error = remote if isinstance(remote, BaseException) else error
        first = FirstError(type=type(error).__name__, message=str(error), where=where, traceback=text)
        summary = f"at step {step}{' ' + where if where else ''}: {type(error).__name__}: {error}"
        return cls(status=status, step=step, summary=summary, first_error=first)

    @property
    def exit_status(self) -> int:
        """The process's exit status: 0 for an end that somebody wanted."""
        return {"finished": 0, "stopped": 0, "failed": 1, "refused": 2}[self.status]


def write_outcome(directory: RunDirectory, outcome: Outcome) -> None:
    """Write outcome.json whole."""
    write_atomically(directory.outcome, msgspec.json.format(msgspec.json.encode(outcome)).decode() + "\n")
