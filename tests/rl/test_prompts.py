"""This file tests that prompts are reproducible, fit, and are never both trained on and held out."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import subprocess
import sys

import msgspec
import pytest

from rl.prompt_files import FileLevel
from rl.prompts import PromptSources, validate
from rl.questions import nearest, plain
from rl.reasoning_gym_prompts import catalogue, parameters
from rl.source_config import HubSource, JsonlSource, ReasoningGymSource, Source
from rl.trajectory import Message

ONE_DIGIT = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
SUMS = ReasoningGymSource(
    kind="reasoning_gym",
    dataset="chain_sum",
    levels={"one_digit": ONE_DIGIT, "long": {"min_terms": 8, "max_terms": 8}},
    instruction="Answer with a number.",
)


def render(messages: tuple[Message, ...]) -> tuple[int, ...]:
    """One token per word."""
    return tuple(range(sum(len(message.text.split()) for message in messages)))


def open_sources(seed: int = 0, limit: int = 100, system_prompt: str | None = None, **sources: Source) -> PromptSources:
    return PromptSources.open(sources, render, limit, seed, system_prompt)


def write_jsonl(path: pathlib.Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def questions(count: int, start: int = 0) -> list[dict[str, str]]:
    return [{"prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(start, start + count)]


def jsonl(path: str, **settings) -> JsonlSource:
    return JsonlSource(kind="jsonl", path=path, **settings)


# reasoning_gym


def test_a_reasoning_gym_prompt_carries_its_entry_for_the_datasets_own_scorer() -> None:
    import reasoning_gym

    prompt = open_sources(sums=SUMS).next("sums", "one_digit")
    assert prompt.messages[-1].text.endswith("=\nAnswer with a number.")
    assert prompt.token_ids == render(prompt.messages)
    assert prompt.columns["dataset"] == "chain_sum" and prompt.reference == prompt.columns["entry"]["answer"]
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(prompt.columns)) == prompt.columns
    score = reasoning_gym.get_score_answer_fn("chain_sum")
    assert score(prompt.reference, prompt.columns["entry"]) == 1.0


def test_levels_use_their_own_parameters() -> None:
    sources = open_sources(sums=SUMS)
    assert sources.levels == {"sums": ("one_digit", "long")}
    assert sources.next("sums", "one_digit").columns["entry"]["metadata"]["num_terms"] == 2
    assert sources.next("sums", "long").columns["entry"]["metadata"]["num_terms"] == 8


def test_the_same_seed_gives_the_same_prompts_and_an_id_names_one_prompt_in_any_run() -> None:
    first, again, other = (open_sources(seed, sums=SUMS) for seed in (1, 1, 2))
    drawn = [[sources.next("sums", "long") for _ in range(20)] for sources in (first, again, other)]
    assert drawn[0] == drawn[1]
    ids = [{prompt.prompt_id for prompt in prompts} for prompts in drawn]
    assert len(ids[0]) == 20 and not ids[0] & ids[2]
    assert not {p.messages for p in drawn[0]} & {p.messages for p in drawn[2]}


def test_a_level_has_more_prompts_than_reasoning_gym_makes_from_one_seed() -> None:
    sources = open_sources(sums=SUMS)
    drawn = [sources.next("sums", "long") for _ in range(1200)]
    assert len({prompt.messages for prompt in drawn}) == len({prompt.prompt_id for prompt in drawn}) == 1200


def test_held_out_questions_of_a_small_level_are_distinct_and_never_trained_on() -> None:
    sources = open_sources(sums=SUMS)
    held_out = sources.held_out("sums", "one_digit", 1000)
    texts = {prompt.messages for prompt in held_out}
    assert 40 < len(held_out) == len(texts) < 100, "a third of the 200 questions there are"
    trained = {sources.next("sums", "one_digit").messages for _ in range(2000)}
    assert len(trained) > 100 and not trained & texts


def test_held_out_prompts_are_the_same_for_every_seed_and_a_smaller_count_is_a_prefix() -> None:
    held_out = open_sources(1, sums=SUMS).held_out("sums", "long", 12)
    assert open_sources(2, sums=SUMS).held_out("sums", "long", 5) == held_out[:5]
    assert held_out[0].prompt_id.startswith("sums/long/held_out-")


def test_the_system_prompt_comes_first() -> None:
    prompt = open_sources(system_prompt="Be brief.", sums=SUMS).next("sums", "long")
    assert [(message.role, message.text) for message in prompt.messages][0] == ("system", "Be brief.")


def test_an_unknown_dataset_or_parameter_is_refused_with_the_nearest_name() -> None:
    misspelt = ReasoningGymSource(kind="reasoning_gym", dataset="chainsum", levels={"a": {}})
    wrong = ReasoningGymSource(
        kind="reasoning_gym", dataset="chain_sum", levels={"a": {"min_digit": 1}, "b": {"seed": 1}}
    )
    problems = validate({"sums": misspelt, "more": wrong})
    assert len(problems) == 3
    assert "sources.sums.dataset 'chainsum' is no reasoning_gym dataset; did you mean chain_sum" in problems[0]
    assert (
        "sources.more.levels.a sets 'min_digit', which chain_sum does not have; did you mean min_digits" in problems[1]
    )
    assert "sources.more.levels.b sets 'seed', which the run decides; remove it" in problems[2]
    with pytest.raises(ValueError, match="did you mean chain_sum"):
        open_sources(sums=misspelt)


def test_values_that_the_dataset_refuses_are_named_when_the_source_opens() -> None:
    source = ReasoningGymSource(
        kind="reasoning_gym", dataset="chain_sum", levels={"a": {"min_terms": 9, "max_terms": 2}}
    )
    with pytest.raises(ValueError, match=r"sources\.sums\.levels\.a: reasoning_gym refuses .*max_terms must be >="):
        open_sources(sums=source)


def test_names_read_from_the_source_text_are_those_that_the_package_registers() -> None:
    import reasoning_gym  # noqa: F401  fills the registry
    from reasoning_gym.factory import DATASETS

    found = {name: parameters(*entry) for name, entry in catalogue().items()}
    registered = {
        name: tuple(field.name for field in dataclasses.fields(config_class))
        for name, (_, config_class) in DATASETS.items()
    }
    assert found == registered


def test_checking_sources_imports_nothing_heavy(tmp_path: pathlib.Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", *questions(3))
    script = f"""
import sys
from rl.source_config import JsonlSource, ReasoningGymSource
from rl.prompts import validate
sources = {{
    "sums": ReasoningGymSource(kind="reasoning_gym", dataset="gcd", levels={{"a": {{"min_value": 2}}}}),
    "file": JsonlSource(kind="jsonl", path={path!r}),
}}
assert validate(sources) == []
print([name for name in ("torch", "transformers", "vllm", "ray", "reasoning_gym", "datasets") if name in sys.modules])
"""
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_over_long_prompts_of_an_endless_source_are_counted_and_passed_over() -> None:
    levels = {"mixed": {"min_terms": 2, "max_terms": 9, "min_digits": 1, "max_digits": 1}}
    source = ReasoningGymSource(kind="reasoning_gym", dataset="chain_sum", levels=levels)
    sources = open_sources(limit=16, sums=source)
    prompts = [sources.next("sums", "mixed") for _ in range(30)] + sources.held_out("sums", "mixed", 10)
    assert all(len(prompt.token_ids) <= 16 for prompt in prompts) and len(prompts) == 40
    assert sources.refused["sums"] > 0
    assert sources.metrics()["prompts/refused_too_long/sums"].value == sources.refused["sums"]


def test_an_endless_level_with_only_over_long_prompts_is_refused_at_the_start_with_id_and_lengths() -> None:
    expected = r"100 prompts in a row of sums/one_digit are longer than 10 tokens.*sums/one_digit/0-.*has 1"
    with pytest.raises(ValueError, match=expected):
        open_sources(limit=10, sums=SUMS)


def test_the_look_at_each_level_at_the_start_draws_nothing() -> None:
    sources = open_sources(sums=SUMS)
    assert all(count == 0 for levels in sources.state_dict()["cursors"].values() for count in levels.values())


# files


def test_a_file_is_drawn_in_a_new_order_each_epoch_and_none_is_missing(tmp_path: pathlib.Path) -> None:
    sources = open_sources(file=jsonl(write_jsonl(tmp_path / "a.jsonl", *questions(20))))
    epochs = [[sources.next("file", "all").prompt_id for _ in range(20)] for _ in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(f"file/all/{line}" for line in range(1, 21))
    assert epochs[0] != epochs[1] != epochs[2]


def test_columns_levels_conversations_and_references_of_a_file_are_kept(tmp_path: pathlib.Path) -> None:
    turns = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "2+2?"},
    ]
    row = {"chat": turns, "solution": 4, "grade": 7, "unit": None, "completion": "x", "nested": {"a": [1, 2]}}
    path = write_jsonl(tmp_path / "a.jsonl", row)
    settings = {
        "prompt_column": "chat",
        "reference_column": "solution",
        "level_column": "grade",
        "instruction": "Be brief.",
    }
    prompt = open_sources(file=jsonl(path, **settings)).next("file", "7")
    assert [message.text for message in prompt.messages] == ["Hello", "Hi", "2+2?\nBe brief."]
    assert prompt.reference == "4"
    assert prompt.columns == {"solution": 4, "grade": 7, "unit": None, "nested": {"a": [1, 2]}}, (
        "what rewards may be passed"
    )


def test_a_bad_line_is_named_by_its_number(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n\n{"prompt": "a", \n', encoding="utf-8")
    (problem,) = validate({"file": jsonl(str(path))})
    assert f"sources.file: {path} line 3 is no JSON" in problem
    with pytest.raises(ValueError, match="line 3 is no JSON"):
        open_sources(file=jsonl(str(path)))


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ([1], {}, "line 1 is a list, not an object"),
        ({"promt": "a", "answer": "b"}, {}, "line 1 has no column 'prompt'; did you mean promt.; set prompt_column"),
        (
            {"prompt": "a", "solution": "b"},
            {},
            "has no column 'answer'; .*set reference_column .null where there is none",
        ),
        ({"prompt": "a", "answer": "b"}, {"level_column": "grade"}, "has no column 'grade'; .*set level_column"),
        ({"prompt": "", "answer": "b"}, {}, "column 'prompt' holds ''; it must be a text that is not empty"),
        ({"prompt": [{"text": "a"}], "answer": "b"}, {}, "column 'prompt' holds .*list of"),
    ],
)
def test_a_row_that_does_not_fit_is_named(tmp_path: pathlib.Path, row, settings, message: str) -> None:
    source = jsonl(write_jsonl(tmp_path / "a.jsonl", row), **settings)
    with pytest.raises(ValueError, match=message):
        open_sources(file=source)
    assert len(validate({"file": source})) == 1


def test_a_missing_or_empty_file_is_named(tmp_path: pathlib.Path) -> None:
    empty = write_jsonl(tmp_path / "empty.jsonl")
    problems = validate({"gone": jsonl(str(tmp_path / "gone.jsonl")), "empty": jsonl(empty)})
    assert "sources.gone: cannot read" in problems[0] and "No such file" in problems[0]
    assert "sources.empty holds no rows" in problems[1]


def test_over_long_prompts_of_a_file_are_refused_by_id_with_their_lengths(tmp_path: pathlib.Path) -> None:
    rows = [{"prompt": "word " * length, "answer": None} for length in (5, 30, 10, 40)]
    held_out = write_jsonl(tmp_path / "held_out.jsonl", {"prompt": "long " * 25, "answer": None})
    source = jsonl(write_jsonl(tmp_path / "a.jsonl", *rows), held_out_path=held_out)
    named = r"sources\.file: 3 prompts are longer than 20 tokens: file/all/2 \(30 tokens\), file/all/4 \(40 tokens\), "
    with pytest.raises(ValueError, match=named + r"file/all/held_out-1 \(25 tokens\); raise model\.max_context_tokens"):
        open_sources(limit=20, file=source)


def test_rows_that_are_held_out_anywhere_are_not_trained_on_and_are_counted(tmp_path: pathlib.Path) -> None:
    held_out = write_jsonl(tmp_path / "held_out.jsonl", *questions(6, start=8))
    first = jsonl(write_jsonl(tmp_path / "a.jsonl", *questions(10)), held_out_path=held_out)
    second = jsonl(write_jsonl(tmp_path / "b.jsonl", *questions(10, start=5)))
    sources = open_sources(first=first, second=second)
    asked = {prompt.messages for prompt in sources.held_out("first", "all", 100)}
    assert len(asked) == 6
    trained = {sources.next(source, "all").messages for source in ("first", "second") for _ in range(30)}
    assert not trained & asked
    assert dict(sources.in_held_out) == {"first": 2, "second": 6}
    assert sources.metrics()["prompts/left_out_as_held_out/second"].value == 6
    assert sources.held_out("second", "all", 5) == [], "it has no held-out file"


def test_a_file_whose_rows_are_all_held_out_is_refused(tmp_path: pathlib.Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", *questions(3))
    with pytest.raises(ValueError, match="all 3 rows of level all are held-out ones as well"):
        open_sources(file=jsonl(path, held_out_path=path))


def test_held_out_levels_must_be_training_levels(tmp_path: pathlib.Path) -> None:
    train = write_jsonl(tmp_path / "a.jsonl", {"prompt": "a", "answer": "b", "grade": "easy"})
    test = write_jsonl(tmp_path / "b.jsonl", {"prompt": "c", "answer": "b", "grade": "hard"})
    with pytest.raises(ValueError, match=r"held-out rows have the levels \['hard'\], .* only \['easy'\]"):
        open_sources(file=jsonl(train, held_out_path=test, level_column="grade"))


# hub


@pytest.fixture
def hub_folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A dataset as a local folder, which `datasets` loads like one from the hub; its cache stays in tmp_path."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "dataset"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", *questions(6))
    write_jsonl(folder / "test.jsonl", *questions(3, start=6))
    return str(folder)


def test_a_hub_dataset_trains_on_one_split_and_evaluates_on_another(hub_folder: str) -> None:
    sources = open_sources(math=HubSource(kind="hub", dataset=hub_folder, held_out_split="test"))
    drawn = {sources.next("math", "all").prompt_id for _ in range(6)}
    assert drawn == {f"math/all/{row}" for row in range(6)}
    assert {prompt.reference for prompt in sources.held_out("math", "all", 9)} == {"12", "14", "16"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "validation"}, "split 'validation' .*Should be one of"),
        ({"subset": "hard"}, "subset hard.*'hard' not found"),
        ({"prompt_column": "question"}, "train row 0 has no column 'question'"),
    ],
)
def test_a_hub_dataset_without_that_split_subset_or_column_is_refused(hub_folder: str, settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_sources(math=HubSource(kind="hub", dataset=hub_folder, **settings))


def test_a_hub_dataset_that_is_a_missing_folder_is_found_by_the_check() -> None:
    assert "does not exist" in validate({"math": HubSource(kind="hub", dataset="./no/such/folder")})[0]
    assert validate({"math": HubSource(kind="hub", dataset="openai/gsm8k")}) == []


# cursors and helpers


def test_cursors_saved_midway_continue_with_the_same_prompts(tmp_path: pathlib.Path) -> None:
    file = jsonl(write_jsonl(tmp_path / "a.jsonl", *questions(7)))
    sources, restored = (open_sources(5, sums=SUMS, file=file) for _ in range(2))
    for _ in range(10):
        sources.next("sums", "long")
        sources.next("file", "all")
    restored.load_state_dict(json.loads(json.dumps(sources.state_dict())))
    for source, level in [("sums", "long"), ("sums", "one_digit"), ("file", "all")] * 10:
        assert sources.next(source, level) == restored.next(source, level)


def test_cursors_of_other_sources_are_refused(tmp_path: pathlib.Path) -> None:
    file = jsonl(write_jsonl(tmp_path / "a.jsonl", *questions(7)))
    with pytest.raises(ValueError, match="saved run drew from the levels .*one_digit"):
        open_sources(file=file).load_state_dict(open_sources(sums=SUMS).state_dict())


def test_an_order_depends_on_seed_and_epoch_alone(tmp_path: pathlib.Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", *questions(9))
    source = open_sources(3, file=jsonl(path))._streams["file"]["all"]
    assert isinstance(source, FileLevel)
    forward = [source.training(cursor)[0] for cursor in range(27)]
    assert [source.training(cursor)[0] for cursor in reversed(range(27))] == forward[::-1]


def test_plain_content_survives_the_wire() -> None:
    class Odd:
        def __str__(self) -> str:
            return "odd"

    content = plain({1: (1, 2), "set": {3}, "huge": 1 << 80, "odd": Odd(), "same": [None, True, 1.5, "a"]})
    assert content == {"1": [1, 2], "set": [3], "huge": str(1 << 80), "odd": "odd", "same": [None, True, 1.5, "a"]}
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(content)) == content


def test_a_name_that_is_near_nothing_gets_the_whole_list() -> None:
    assert nearest("zzz", ["b", "a"]) == "known: a, b"
