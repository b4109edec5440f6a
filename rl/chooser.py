"""This file says what chooses the next prompt: the contract, the reasons it gives, and how a class of one's own loads.

A class of one's own is named in curriculum.name, as module:Class or path/to/file.py:Class, and is made with the Setup
and, as keywords, curriculum.params. What must hold for any choice is kept around it, in rl/curriculum.py: evidence per
level, the bounds on groups without signal, what metrics and draws.jsonl tell.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Protocol

import msgspec

from rl.beliefs import BucketBeliefs, Feedback
from rl.curriculum_config import BUILT_IN_NAMES, CurriculumSection
from rl.metrics import Metrics
from rl.questions import KnownPrompt


class Numbers(msgspec.Struct, frozen=True, omit_defaults=True):
    """What was believed of a level or a prompt: its mean pass rate, from so many answers.

    sampled is the pass rate that was drawn from the belief, and compared; None where nothing was compared.
    """

    pass_rate: float
    answers: float
    sampled: float | None = None


class Reason(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Why this prompt was drawn, at policy `version`.

    why: uniform; explore, the level's turn; band, believed learnable; nearest, the best outside the band; or a word of
    a class of one's own. prompt_why, where its level repeats prompts: explore, the next of the epoch; band or nearest;
    reprobe, it was retired. credit is what its source was due, in draws; lender, the source that lent its turn.
    """

    why: str
    version: int
    level: Numbers | None = None
    signal: float | None = None  # the expected chance that the level's next group teaches
    credit: float | None = None
    lender: str | None = None
    prompt_why: str | None = None
    prompt: Numbers | None = None
    notes: dict[str, Any] = {}  # of a class of one's own


class Choice(msgspec.Struct, frozen=True):
    """A draw: where from, and why. key names a prompt of a finite level; None takes the next one."""

    source: str
    level: str
    reason: Reason
    key: str | None = None

    @property
    def why(self) -> str:
        """The word for why this level was drawn."""
        return self.reason.why


@dataclass(frozen=True)
class Setup:
    """What a chooser is made of: sources with their levels and weights, prompts of finite levels, and the beliefs.

    beliefs are kept by the run; a chooser only reads them. Draws that are to be the same in every run of one seed must
    depend on nothing but seed, number of draws and feedback.
    """

    levels: Mapping[str, tuple[str, ...]]
    weights: Mapping[str, float]
    section: CurriculumSection
    group_size: int
    seed: int
    beliefs: BucketBeliefs
    prompts: Mapping[str, Mapping[str, Sequence[KnownPrompt]]] = field(default_factory=dict)


class Chooser(Protocol):
    """What decides the next draw."""

    def draw(self, version: int) -> Choice: ...
    def observe(self, feedback: Feedback) -> None: ...
    def metrics(self) -> Metrics: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


METHODS = ("draw", "observe", "metrics", "state_dict", "load_state_dict")
Build = Callable[..., Chooser]


def check_name(name: str) -> None:
    """Raise ValueError where curriculum.name names no module, file or class there is, without importing any."""
    if name in BUILT_IN_NAMES:
        return
    place, _, wanted = name.rpartition(":")
    if not wanted.isidentifier() or not place:
        raise ValueError(f"curriculum.name {name!r} is neither module:Class nor path/to/file.py:Class")
    if not place.endswith(".py"):
        if importlib.util.find_spec(place.partition(".")[0]) is None:
            raise ValueError(f"curriculum.name {name!r}: there is no module {place!r}; install its package")
        return
    path = pathlib.Path(place).expanduser()
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except OSError as error:
        raise ValueError(f"curriculum.name {name!r}: {path} cannot be read ({error.strerror}); correct it") from error
    except SyntaxError as error:
        raise ValueError(f"curriculum.name {name!r}: {path} line {error.lineno}: {error.msg}; correct it") from error
    known = [node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    if wanted not in known:
        raise ValueError(f"curriculum.name {name!r}: {path} has no class {wanted}; it has {', '.join(known) or 'none'}")


def load_chooser(name: str, setup: Setup, params: Mapping[str, Any]) -> Chooser:
    """Import and make a class of one's own. ValueError says what is wrong with its path, itself or its params."""
    check_name(name)
    place, _, wanted = name.rpartition(":")
    try:
        module = _module_of_file(pathlib.Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:  # whatever its import raises is the file's mistake, and told as such
        raise ValueError(f"curriculum.name {name!r} does not import: {type(error).__name__}: {error}") from error
    build: Build | None = getattr(module, wanted, None)
    if not callable(build):
        raise ValueError(f"curriculum.name {name!r}: {place} has no class {wanted}")
    try:
        chooser = build(setup, **params)
    except TypeError as error:
        raise ValueError(f"curriculum.name {name!r} does not take the setup and {dict(params)}: {error}") from error
    missing = [method for method in METHODS if not callable(getattr(chooser, method, None))]
    if missing:
        raise ValueError(f"curriculum.name {name!r} lacks {', '.join(missing)}; see Chooser in rl/chooser.py")
    return chooser


def _module_of_file(path: pathlib.Path) -> ModuleType:
    path = path.expanduser().absolute()
    spec = importlib.util.spec_from_file_location(f"slipstream_curriculum_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module
