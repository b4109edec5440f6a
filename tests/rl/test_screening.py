"""This file tests rl/screening.py and rl/screen.py: pass rates are written once each, and filter a source."""

from __future__ import annotations

import asyncio
import io
import json
import pathlib

import pytest
from rich.console import Console
from typer.testing import CliRunner

from rl.cli import application
from rl.config_loading import parse_config
from rl.orders import Draw
from rl.prompts import PromptSources, left_out_by_difficulty, validate
from rl.screen import answer, plan, write
from rl.screening import default_path, distribution, read_screened, render
from rl.source_config import Difficulty, HubSource, JsonlSource
from rl.trajectory import GroupReport
from tests.fakes import make_group, make_report

PASSES = {"1": 0, "2": 4, "3": 8, "4": 2}
MODEL = "a/model"


def rows(path: pathlib.Path, **texts: str) -> None:
    lines = [{"prompt": texts.get(f"p{i}", f"What is {i} + {i}?"), "answer": str(2 * i)} for i in range(1, 5)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def render_messages(messages) -> tuple[int, ...]:
    return (1, 2, 3)


def opened(**sources) -> PromptSources:
    return PromptSources.open(sources, render_messages, 100, 0)


@pytest.fixture
def source(tmp_path: pathlib.Path) -> JsonlSource:
    rows(tmp_path / "sums.jsonl")
    return JsonlSource(kind="jsonl", path=str(tmp_path / "sums.jsonl"))


def config_of(source: JsonlSource, tmp_path: pathlib.Path):
    text = f"""
run: {{steps: 1, dir: {tmp_path / "runs"}}}
model: {{path: {MODEL}}}
sources: {{sums: {{kind: jsonl, path: {source.path}}}}}
rewards: {{functions: {{correct: {{use: math}}}}}}
"""
    return parse_config(text, "a test")


async def rollout(draw: Draw) -> GroupReport:
    """An engine whose answers are right as often as PASSES says."""
    await asyncio.sleep(0)
    passes = PASSES[draw.prompt.prompt_id.rpartition("/")[2]]
    return make_report(make_group(draw, [1.0] * passes + [0.0] * (8 - passes)))


async def unjudged(draw: Draw) -> GroupReport:
    return make_report(make_group(draw, [None] * 8))


async def screened(source: JsonlSource, tmp_path: pathlib.Path, engine=rollout, limit: int = 99) -> int:
    """Screen at most `limit` prompts; returns how many there were to screen."""
    prompts = opened(sums=source.model_copy(update={"difficulty": None}))
    (work,) = plan(config_of(source, tmp_path), prompts)
    results = answer(work, prompts, engine, MODEL, 2, 0)

    async def some():
        for _ in range(min(limit, len(work.todo))):
            yield await anext(results)

    await write(work, some(), lambda text: None)
    await results.aclose()
    return len(work.todo)


def cut_a_line(source: JsonlSource) -> None:
    """What a crash leaves."""
    with pathlib.Path(source.path + ".difficulty.jsonl").open("a") as file:
        file.write('{"prompt": "3", "quest')


def with_difficulty(source: JsonlSource, **bounds) -> JsonlSource:
    return source.model_copy(update={"difficulty": Difficulty(**bounds)})


async def test_every_prompt_is_answered_once_and_a_second_call_goes_on_where_the_first_ended(source, tmp_path) -> None:
    assert await screened(source, tmp_path, limit=3) == 4
    cut_a_line(source)
    assert await screened(source, tmp_path) == 1
    assert await screened(source, tmp_path) == 0
    found = read_screened(default_path(source, tmp_path))
    assert {key: (each.passes, each.answers, each.pass_rate) for key, each in found.items()} == {
        key: (passes, 8, passes / 8) for key, passes in PASSES.items()
    }
    assert found["2"].model == MODEL and found["2"].date.startswith("20")


async def test_what_could_not_be_judged_is_not_written_and_comes_again(source, tmp_path) -> None:
    await screened(source, tmp_path, unjudged)
    assert await screened(source, tmp_path) == 4


async def test_a_prompt_whose_text_or_model_changed_is_answered_anew(source, tmp_path) -> None:
    await screened(source, tmp_path)
    rows(pathlib.Path(source.path), p2="What is 2 times 2?")
    assert await screened(source, tmp_path) == 1
    path = default_path(source, tmp_path)
    path.write_text(path.read_text().replace(MODEL, "another/model"))
    assert await screened(source, tmp_path) == 4


async def test_difficulty_leaves_out_what_is_too_hard_or_too_easy_and_tells_how_many(source, tmp_path) -> None:
    await screened(source, tmp_path)
    sifted = with_difficulty(source, min_pass_rate=0.1, max_pass_rate=0.9)
    prompts = opened(sums=sifted)
    assert {prompts.next("sums", "all").prompt_id for _ in range(8)} == {"sums/all/2", "sums/all/4"}
    known = {each.key: (each.passed, each.answers) for each in prompts.known["sums"]["all"]}
    assert known == {"2": (4.0, 8), "4": (2.0, 8)}
    assert prompts.metrics()["prompts/left_out_by_difficulty/sums"].value == 2
    assert prompts.metrics()["prompts/unscreened/sums"].value == 0
    assert left_out_by_difficulty({"sums": sifted}) == {"sums": (2, 4)}


async def test_a_prompt_that_was_edited_since_is_kept_and_counted_as_unscreened(source, tmp_path) -> None:
    await screened(source, tmp_path)
    rows(pathlib.Path(source.path), p1="What is 0 + 2?")
    prompts = opened(sums=with_difficulty(source, min_pass_rate=0.1))
    assert len(prompts.known["sums"]["all"]) == 4
    assert prompts.metrics()["prompts/unscreened/sums"].value == 1


def test_a_difficulty_that_is_not_there_is_refused_with_the_command_that_makes_it(source) -> None:
    (problem,) = validate({"sums": with_difficulty(source)})
    assert "difficulty.jsonl does not exist; run `rl screen` on this config" in problem


async def test_bounds_that_leave_nothing_of_a_level_are_refused(source, tmp_path) -> None:
    await screened(source, tmp_path)
    (problem,) = validate({"sums": with_difficulty(source, min_pass_rate=0.6, max_pass_rate=0.7)})
    assert "all 4 prompts of level all have pass rates outside 0.6..0.7" in problem


def test_a_line_of_another_kind_is_named(source) -> None:
    pathlib.Path(source.path + ".difficulty.jsonl").write_text('{"prompt": 3}\n')
    (problem,) = validate({"sums": with_difficulty(source)})
    assert "line 1 is not of rl screen" in problem


def test_the_difficulty_of_a_hub_dataset_lies_in_the_runs_cache() -> None:
    hub = HubSource(kind="hub", dataset="openai/gsm8k", subset="main")
    path = default_path(hub, pathlib.Path("runs/cache"))
    assert path == pathlib.Path("runs/cache/openai--gsm8k--main--train.difficulty.jsonl")
    named = hub.model_copy(update={"difficulty": Difficulty(path="elsewhere.jsonl")})
    assert default_path(named, pathlib.Path("runs/cache")) == pathlib.Path("elsewhere.jsonl")


def test_pass_rates_are_counted_in_tenths_with_the_ends_apart() -> None:
    counts = distribution([0.0, 0.0, 0.05, 0.1, 0.125, 0.5, 0.95, 1.0])
    assert counts == [2, 2, 1, 0, 0, 1, 0, 0, 0, 0, 1, 1]


async def test_the_table_shows_each_level(source, tmp_path) -> None:
    await screened(source, tmp_path)
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(render("sums", {"all": list(read_screened(default_path(source, tmp_path)).values())}))
    *_, line = console.export_text().splitlines()
    assert line.split()[:4] == ["all", "4", "0.44", "1"] and line.split()[-1] == "1"


def test_endless_sources_are_refused_by_the_command() -> None:
    done = CliRunner().invoke(application, ["screen", "arithmetic"])
    assert done.exit_code == 2
