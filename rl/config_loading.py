"""This file turns a YAML file and dotted `key=value` overrides into a RunConfig, and a RunConfig into YAML.

Everything a person can get wrong here ends as one ValueError that fits a screen: fact, value, fix.
"""

from __future__ import annotations

import difflib
import pathlib
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pydantic
import yaml

from rl.config import RunConfig

SHIPPED_CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
PROBLEMS_SHOWN = 8


class _StrictLoader(yaml.SafeLoader):
    """YAML as people mean it: a key given twice is refused, and 1e-5 is a number (YAML 1.1 asks for 1.0e-5)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        first_lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if isinstance(key, str) and key in first_lines:
                raise ValueError(f"key {key!r} stands on line {first_lines[key]} and again on line {line}; delete one")
            if isinstance(key, str):
                first_lines[key] = line
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_config(config: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a config by path, or by the bare name of a file in configs/, and apply overrides such as `learner.lr=2e-5`.

    Raises:
        ValueError: the file is missing or unreadable, or its content with the overrides is no valid RunConfig.
    """
    path = find_config(config)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the config {path}: {error}; give a readable YAML file") from None
    return parse_config(text, str(path), overrides)


def find_config(config: str) -> pathlib.Path:
    """The file that CONFIG means: a path, or NAME for configs/NAME.yaml here or in the installed tree.

    Raises:
        ValueError: there is no such file; the message lists the names there are.
    """
    if pathlib.Path(config).is_file():
        return pathlib.Path(config)
    folders = (pathlib.Path("configs"), SHIPPED_CONFIGS)
    if re.fullmatch(r"[\w-]+", config):
        for folder in folders:
            candidate = folder / f"{config}.yaml"
            if candidate.is_file():
                return candidate
    names = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    raise ValueError(
        f"there is no config {config!r}{_nearest(pathlib.Path(config).stem, names)}; "
        f"give the path of a YAML file or one of: {', '.join(names)}"
    )


def parse_config(text: str, origin: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Make a RunConfig of YAML text; `origin` names it in messages.

    Raises:
        ValueError: listing every problem with its dotted path, the value given and what would be right.
    """
    data = _read_yaml(text, origin)
    if not isinstance(data, dict):
        raise ValueError(f"{origin} holds {type(data).__name__}, not sections; start from configs/arithmetic.yaml")
    for override in overrides:
        _apply(data, override)
    try:
        return RunConfig.model_validate(data)
    except pydantic.ValidationError as error:
        raise ValueError(_explain(error, origin)) from None


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML, every default written out; parse_config gives it back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def _read_yaml(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, Loader=_StrictLoader)  # a SafeLoader underneath
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ValueError(f"{origin}{where} is not YAML: {problem}; check indentation, colons and quotes") from None
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from None


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ValueError(f"override {override!r} is not of the form section.key=value, such as learner.lr=2e-5")
    *sections, last = key.split(".")
    place = data
    for depth, section in enumerate(sections, start=1):
        if place.get(section) is None:
            place[section] = {}
        place = place[section]
        if not isinstance(place, dict):
            raise ValueError(
                f"override {override!r} goes below {'.'.join(sections[:depth])}, which is {place!r} and no section; "
                "set that key itself"
            )
    place[last] = _read_yaml(value, f"override {override!r}")


def _explain(error: pydantic.ValidationError, origin: str) -> str:
    problems = [_problem(item) for item in error.errors(include_url=False)]
    shown = problems[:PROBLEMS_SHOWN]
    if len(problems) > len(shown):
        shown.append(f"and {len(problems) - len(shown)} more")
    if len(shown) == 1:
        return f"{origin}: {shown[0]}"
    return f"{origin} has {len(problems)} problems:\n" + "\n".join(f"  - {line}" for line in shown)


def _problem(item: Mapping[str, Any]) -> str:
    location = item["loc"]
    path, value = _dotted(location), item["input"]
    match item["type"]:
        case "extra_forbidden":
            return f"{path} is set to {_short(value)}, but {_no_such_key(location)}"
        case "missing":
            return f"{path} is missing{_meaning(location)}; add it"
        case "value_error":
            message = str(item["ctx"]["error"])
            return f"{path}: {message}" if path else message
        case "union_tag_invalid":
            given, expected = item["ctx"]["tag"], re.findall(r"'(\w+)'", item["ctx"]["expected_tags"])
            key = item["ctx"]["discriminator"].strip("'")
            return f"{path}.{key} is {given!r}{_nearest(given, expected)}; take one of: {', '.join(expected)}"
        case "union_tag_not_found":
            key = item["ctx"]["discriminator"].strip("'")
            return f"{path}.{key} is missing; add {key}: {' or '.join(_tags(location, key))}"
        case "literal_error":
            names = re.findall(r"'(\w+)'", item["ctx"]["expected"])
            return f"{path} is {value!r}{_nearest(str(value), names)}; take one of: {', '.join(names)}"
    wanted = re.sub(r"^Input should be (a |an )?", r"must be \1", item["msg"])
    return f"{path} is {_short(value)}, but {wanted}{_meaning(location)}; change it"


def _no_such_key(location: Sequence[str | int]) -> str:
    """What to say of an unknown key: the nearest name beside it, or the section where that very name lives."""
    name = str(location[-1])
    siblings = list(_fields(location[:-1]))
    where = _dotted(location[:-1])
    elsewhere = [f"{section}.{name}" for section in _fields(()) if section != where and name in _fields((section,))]
    advice = f"; did you mean {elsewhere[0]}?" if elsewhere else _nearest(name, siblings)
    return f"there is no such key{advice}; {where or 'the top level'} takes: {', '.join(siblings)}"


def _steps(location: Sequence[str | int]) -> Iterator[tuple[str | int, Any]]:
    """Walk a pydantic error location through the types of RunConfig: (step, type found there)."""
    here: Any = RunConfig
    for step in location:
        if isinstance(here, type) and issubclass(here, pydantic.BaseModel):
            field = here.model_fields.get(str(step))
            here = _present(field.annotation) if field else None
        elif typing.get_origin(here) is dict:
            here = typing.get_args(here)[1]
        else:
            here = _member(here, step)
        yield step, here


def _present(annotation: Any) -> Any:
    """A for A | None, anything else as it is: pydantic puts no step into a location for a section that may be null."""
    members = [member for member in typing.get_args(annotation) if member is not type(None)]
    return members[0] if len(members) == 1 and type(None) in typing.get_args(annotation) else annotation


def _members(union: Any) -> tuple[Any, ...]:
    """The members of A | B, or of Annotated[A | B, Field(discriminator=...)], which a dictionary's values keep."""
    members = typing.get_args(union)
    return typing.get_args(members[0]) if members and typing.get_args(members[0]) else members


def _member(union: Any, tag: str | int) -> Any:
    """The member of a discriminated union whose tag this is; None for anything else."""
    for member in _members(union):
        fields = getattr(member, "model_fields", {})
        if any(key in fields and tag in typing.get_args(fields[key].annotation) for key in ("kind", "name")):
            return member
    return None


def _tags(location: Sequence[str | int], key: str) -> list[str]:
    """What the discriminator `key` of the union at this place may be."""
    *_, union = RunConfig, *(found for _, found in _steps(location))
    return [tag for member in _members(union) for tag in typing.get_args(member.model_fields[key].annotation)]


def _fields(location: Sequence[str | int]) -> dict[str, pydantic.fields.FieldInfo]:
    *_, here = RunConfig, *(found for _, found in _steps(location))
    return getattr(here, "model_fields", {})


def _meaning(location: Sequence[str | int]) -> str:
    field = _fields(location[:-1]).get(str(location[-1]))
    return f" ({field.description})" if field is not None and field.description else ""


def _dotted(location: Sequence[str | int]) -> str:
    """The location as a person writes it: without the tag that pydantic puts after a union's key."""
    parts: list[str] = []
    before: Any = RunConfig
    for step, here in _steps(location):
        is_tag = _member(before, step) is not None and not hasattr(before, "model_fields")
        if not is_tag:
            parts.append(str(step))
        before = here
    return ".".join(parts)


def _nearest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
