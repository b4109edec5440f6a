"""This file checks every configuration in configs/: it loads, fits a page, and gives a reason for each value."""

from __future__ import annotations

import pathlib
from typing import get_args

import pytest
import yaml
from pydantic import BaseModel

from rewards.loading import resolve
from rl.check import arithmetic, problems
from rl.config import RunConfig
from rl.config_loading import dump_config, load_config, parse_config

CONFIGS = sorted((pathlib.Path(__file__).parent.parent / "configs").glob("*.yaml"))
MAX_LINES = 60

each_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


@each_config
def test_a_shipped_config_loads_and_rl_check_finds_nothing_wrong(path):
    config = load_config(str(path))
    assert problems(config, resolve) == []
    assert arithmetic(config, cores=2)


@each_config
def test_a_shipped_config_is_the_same_after_being_written_out(path):
    config = load_config(str(path))
    assert parse_config(dump_config(config), "config.yaml") == config


@each_config
def test_a_shipped_config_fits_a_page(path):
    assert len(path.read_text().splitlines()) <= MAX_LINES


@each_config
def test_each_value_that_is_not_the_default_says_why(path):
    lines = path.read_text().splitlines()
    unexplained = [lines[line] for line in lines_that_differ(path.read_text()) if " # " not in lines[line]]
    assert not unexplained, "a `# why` is missing"


@each_config
def test_a_shipped_config_repeats_no_default(path):
    assert not lines_that_repeat(path.read_text())


def test_the_gpu_config_occupies_one_node_of_eight():
    from rl.check import devices_needed

    assert devices_needed(load_config("gsm8k_gpu")) == 8


def lines_that_differ(text: str) -> list[int]:
    """Line numbers (from 0) of values that differ from their field's default; required fields have no default."""
    return [line for line, is_default in judged_lines(text) if not is_default]


def lines_that_repeat(text: str) -> list[int]:
    """Line numbers (from 0) of values that are their field's default anyway."""
    return [line for line, is_default in judged_lines(text) if is_default]


def judged_lines(text: str) -> list[tuple[int, bool]]:
    found: list[tuple[int, bool]] = []
    _judge(yaml.compose(text), parse_config(text, "config"), found)
    return found


def _judge(node: yaml.Node, section: BaseModel | dict, found: list[tuple[int, bool]]) -> None:
    assert isinstance(node, yaml.MappingNode)
    for key_node, value_node in node.value:
        if isinstance(section, dict):
            value, field = section[key_node.value], None
        else:
            value, field = getattr(section, key_node.value), type(section).model_fields[key_node.value]
        if isinstance(value, BaseModel) or (isinstance(value, dict) and any_sections(value)):
            _judge(value_node, value, found)
        elif field is not None and not field.is_required():
            found.append((key_node.start_mark.line, value == field.get_default(call_default_factory=True)))


def any_sections(value: dict) -> bool:
    return any(isinstance(item, BaseModel) for item in value.values())


def test_the_judging_of_lines_sees_defaults_and_differences():
    text = (
        "run:\n  steps: 3\nmodel:\n  path: x\nsources:\n  s: {kind: jsonl, path: y}\n"
        "rewards:\n  functions:\n    r:\n      use: math\n      weight: 2\nlearner:\n  lr: 1e-5\n  ranks: 2\n"
    )
    assert isinstance(parse_config(text, "text"), RunConfig)
    assert lines_that_differ(text) == [10, 13]
    assert lines_that_repeat(text) == [12]


def test_the_tables_hold_exactly_what_the_config_names():
    from learners.advantages import ADVANTAGES
    from learners.aggregations import AGGREGATIONS
    from learners.algorithms import LOSSES
    from learners.penalties import DIVERGENCES
    from rl.algorithm_config import AdvantageName, AggregationName, AlgorithmSection, ReferenceKl

    assert tuple(ADVANTAGES) == get_args(AdvantageName)
    assert tuple(AGGREGATIONS) == get_args(AggregationName)
    assert tuple(LOSSES) == get_args(AlgorithmSection.model_fields["loss"].annotation)
    assert tuple(DIVERGENCES) == get_args(ReferenceKl.model_fields["estimator"].annotation)
