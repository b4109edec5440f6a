"""This file finds a reward by name, module:function or path/to/file.py:function, and makes it callable.

`resolve` is light: it imports no plugin, so `rl check` and the scorer's parent process use it. `load` imports the
plugin and therefore runs in a reward child process.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import msgspec

from rewards.base import NAME_ATTRIBUTE

ENTRY_POINT_GROUP = "slipstream_rl.rewards"
BUILT_INS = {
    "reasoning_gym": "rewards.reasoning_gym_scorer:reasoning_gym_score",
    "math": "rewards.math_answer:math_answer",
    "format": "rewards.format_tags:format_tags",
}

Form = Literal["completion", "batch"]


@dataclass(frozen=True)
class Resolved:
    """Where a reward lives. path is set for a file-based reward, module for any other."""

    use: str
    function: str
    module: str | None = None
    path: Path | None = None

    def read_source(self) -> bytes | None:
        """The file's content now; None for a reward that lives in an importable module, which is not reloaded."""
        return self.path.read_bytes() if self.path else None


@dataclass(frozen=True)
class LoadedReward:
    """A reward function, ready to judge one completion. version is the hash of its source file's content.

    accepts holds the keywords that the function names, or None where it takes any. messages says that a batch function
    wants conversations, as its annotation `completions: list[list[dict]]` tells (TRL's own rewards do).
    """

    function: Callable[..., Any]
    form: Form
    params: Mapping[str, Any]
    version: str
    accepts: frozenset[str] | None
    messages: bool

    def __call__(self, prompt: str, completion: str, reference: str | None, columns: Mapping[str, Any]) -> Any:
        """Calls the function; a coroutine is returned as it is. Returns what the function said of this completion."""
        return CALLS[self.form](self, prompt, completion, reference, columns)

    def keywords(self, available: dict[str, Any]) -> dict[str, Any]:
        """What of the available keywords the function takes; its configured params win."""
        taken = {name: value for name, value in available.items() if self.accepts is None or name in self.accepts}
        return taken | dict(self.params)


def _call_completion(
    loaded: LoadedReward, prompt: str, completion: str, reference: str | None, columns: Mapping[str, Any]
) -> Any:
    own = {"prompt": prompt, "completion": completion, "reference": reference}
    return loaded.function(**loaded.keywords({**columns, **own}))


def _call_batch(
    loaded: LoadedReward, prompt: str, completion: str, reference: str | None, columns: Mapping[str, Any]
) -> Any:
    """A batch of one: so one completion's failure or timeout stays its own."""
    own: dict[str, Any] = {"prompts": prompt, "completions": completion, "reference": reference}
    if loaded.messages:
        own["prompts"] = [{"role": "user", "content": prompt}]
        own["completions"] = [{"role": "assistant", "content": completion}]
    lists = {name: [value] for name, value in {**columns, **own}.items()}
    returned = loaded.function(**loaded.keywords(lists))
    return _only_awaited(returned) if inspect.isawaitable(returned) else _only(returned)


async def _only_awaited(returned: Any) -> Any:
    return _only(await returned)


def _only(returned: Any) -> Any:
    if not isinstance(returned, (list, tuple)) or len(returned) != 1:
        raise ValueError(f"a batch reward got 1 completion and returned {returned!r:.200}; return one number for each")
    return returned[0]


CALLS: dict[Form, Callable[..., Any]] = {"completion": _call_completion, "batch": _call_batch}


def content_version(source: bytes) -> str:
    """The version of a reward whose source file has this content."""
    return hashlib.sha256(source).hexdigest()[:16]


def resolve(use: str) -> Resolved:
    """Where `use` points, without importing it.

    Raises ValueError for an unknown name, a missing file, a file that does not parse or lacks the function, and a
    module that is not installed.
    """
    place, _, function = use.rpartition(":")
    if not place:
        return _resolve_name(use)
    if place.endswith(".py"):
        path = Path(place).expanduser().absolute()
        _check_file(use, path, function)
        return Resolved(use, function, path=path)
    if importlib.util.find_spec(place.partition(".")[0]) is None:
        raise ValueError(
            f"reward {use!r}: no module {place!r}; install its package, or name a file as path/to/file.py:function"
        )
    return Resolved(use, function, module=place)


def _resolve_name(use: str) -> Resolved:
    known = dict(BUILT_INS)
    if use not in known:
        known |= {point.name: point.value for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)}
    if use not in known:
        near = difflib.get_close_matches(use, known, n=3, cutoff=0.4) or sorted(known)
        raise ValueError(
            f"no reward is called {use!r}; did you mean {' or '.join(near)}? "
            "Else name module:function or path/to/file.py:function"
        )
    module, _, function = known[use].partition(":")
    return Resolved(use, function, module=module)


def _check_file(use: str, path: Path, function: str) -> None:
    try:
        source = path.read_bytes()
        tree = ast.parse(source, str(path))
    except OSError as error:
        raise ValueError(f"reward {use!r}: {path} cannot be read ({error.strerror}); correct the path") from error
    except SyntaxError as error:
        raise ValueError(f"reward {use!r}: {path} line {error.lineno}: {error.msg}; correct the file") from error
    if function.encode() not in source:  # it may be imported or assigned; the import in a child settles it
        defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        raise ValueError(f"reward {use!r}: {path} has no function {function!r}; it has {', '.join(defined) or 'none'}")


def load(use: str, params: Mapping[str, Any], source: bytes | None = None) -> LoadedReward:
    """Imports the reward and checks its signature against params; source, when given, stands for the file's content.

    Raises ValueError where it is no reward or does not take params; whatever the plugin's import raises comes through.
    """
    resolved = resolve(use) if source is None else _resolved_file(use)
    source = resolved.read_source() if source is None else source
    if resolved.path is not None and source is not None:
        module = _module_from_source(resolved.path, source)
    else:
        module = importlib.import_module(resolved.module or "")
        source = Path(module.__file__).read_bytes() if module.__file__ else b""
    function = _function_in(module, resolved)
    parameters = inspect.signature(function).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    form = _form_of(use, parameters)
    return LoadedReward(
        function=function,
        form=form,
        params=_checked_params(use, function, parameters, params),
        version=content_version(source),
        accepts=None if takes_any else frozenset(parameters),
        messages=form == "batch" and "dict" in str(parameters["completions"].annotation),
    )


def _resolved_file(use: str) -> Resolved:
    place, _, function = use.rpartition(":")
    return Resolved(use, function, path=Path(place).expanduser().absolute())


def _module_from_source(path: Path, source: bytes) -> ModuleType:
    """Executes the file's content under a module name of its own, so that two versions can live side by side."""
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # at the end: a plugin's neighbours must not shadow installed modules
    module = ModuleType(f"slipstream_reward_{path.stem}_{content_version(source)}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses and pickle look the module up by name
    exec(compile(source, str(path), "exec"), module.__dict__)  # noqa: S102
    return module


def _function_in(module: ModuleType, resolved: Resolved) -> Callable[..., Any]:
    function = getattr(module, resolved.function, None)
    if function is None:
        named = (each for each in vars(module).values() if getattr(each, NAME_ATTRIBUTE, None) == resolved.function)
        function = next(named, None)
    if not callable(function):
        raise ValueError(f"reward {resolved.use!r}: {module.__file__} has no function {resolved.function!r}")
    return function


def _form_of(use: str, parameters: Mapping[str, inspect.Parameter]) -> Form:
    if "completions" in parameters:
        return "batch"
    if "completion" in parameters:
        return "completion"
    raise ValueError(
        f"reward {use!r} takes ({', '.join(parameters)}); name its parameters completion, reference, **columns, "
        "or, for a batch, prompts, completions, **columns"
    )


def _checked_params(
    use: str, function: Callable[..., Any], parameters: Mapping[str, inspect.Parameter], params: Mapping[str, Any]
) -> dict[str, Any]:
    """params, each named in the signature and converted to its annotation, so that a typing error shows at once."""
    keywords = [name for name, each in parameters.items() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    try:
        hints = typing.get_type_hints(function)
    except (NameError, TypeError, AttributeError):  # annotations that only a type checker can read go unchecked
        hints = {}
    checked: dict[str, Any] = {}
    for name, value in params.items():
        if name not in keywords:
            raise ValueError(f"reward {use!r} has no parameter {name!r}; it has {', '.join(keywords)}")
        try:
            checked[name] = msgspec.convert(value, hints.get(name, Any))
        except msgspec.ValidationError as error:
            raise ValueError(f"reward {use!r}: parameter {name} is {value!r}: {error}") from error
        except TypeError:  # an annotation that msgspec does not know
            checked[name] = value
    return checked
