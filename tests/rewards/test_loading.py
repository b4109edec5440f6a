"""This file tests rewards/loading.py: finding a reward, its form, its params and the version of its content."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from rewards.loading import BUILT_INS, content_version, load, resolve

COMPLETION_FORM = (
    "def judge(completion, reference, bonus: float = 0.0, **columns):\n    return len(completion) + bonus\n"
)


def write(folder: Path, source: str) -> str:
    path = folder / "plugin.py"
    path.write_text(source)
    return f"{path}:judge"


def call(use: str, **params):
    return load(use, params)("2+2?", "four", "4", {"level": "easy"})


def test_each_form_gets_what_it_names_and_nothing_else(tmp_path):
    assert call(write(tmp_path, "def judge(completion, prompt, level): return (completion, prompt, level)")) == (
        "four",
        "2+2?",
        "easy",
    )
    assert call(write(tmp_path, "def judge(completion, **columns): return sorted(columns)")) == [
        "level",
        "prompt",
        "reference",
    ]
    assert call(
        write(tmp_path, "def judge(prompts, completions, level, **kw): return [(prompts, completions, level)]")
    ) == (
        ["2+2?"],
        ["four"],
        ["easy"],
    )


def test_a_batch_function_annotated_with_messages_gets_conversations(tmp_path):
    source = "def judge(completions: list[list[dict[str, str]]], **kw): return [completions[0][0]['content']]"
    assert call(write(tmp_path, source)) == "four"


def test_an_async_batch_function_is_awaited_before_its_list_is_opened(tmp_path):
    returned = call(write(tmp_path, "async def judge(completions, **kw): return [float(len(completions[0]))]"))
    assert asyncio.run(returned) == 4.0


@pytest.mark.parametrize("body", ["1.0", "[]", "[1.0, 2.0]", "None"])
def test_a_batch_function_that_does_not_return_one_number_each_raises(tmp_path, body):
    with pytest.raises(ValueError, match="one number for each"):
        call(write(tmp_path, f"def judge(completions, **kw): return {body}"))


def test_params_reach_the_function_converted_to_their_annotation(tmp_path):
    assert call(write(tmp_path, COMPLETION_FORM), bonus=1) == 5.0


@pytest.mark.parametrize(
    ("params", "complaint"), [({"bonsu": 1.0}, "no parameter 'bonsu'.*bonus"), ({"bonus": "much"}, "bonus is 'much'")]
)
def test_params_that_the_function_does_not_take_are_refused_at_load(tmp_path, params, complaint):
    with pytest.raises(ValueError, match=complaint):
        load(write(tmp_path, COMPLETION_FORM), params)


def test_a_reward_is_found_in_its_file_by_its_decorated_name_too(tmp_path):
    source = "from rewards.base import reward\n@reward('judge')\ndef other(completion): return 7.0\n"
    assert call(write(tmp_path, source)) == 7.0


def test_the_version_is_the_content_of_the_file(tmp_path):
    use = write(tmp_path, COMPLETION_FORM)
    first = load(use, {})
    assert first.version == content_version(COMPLETION_FORM.encode()) == load(use, {}).version
    write(tmp_path, COMPLETION_FORM + "# changed\n")
    assert load(use, {}).version != first.version
    assert load(use, {}, COMPLETION_FORM.encode()).version == first.version, "a given source stands for the file"


def test_a_plugin_imports_its_neighbours(tmp_path):
    (tmp_path / "slipstream_test_neighbour.py").write_text("VALUE = 3.0\n")
    assert call(write(tmp_path, "import slipstream_test_neighbour as n\ndef judge(completion): return n.VALUE")) == 3.0


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("def judge(completion:", "line 1"),
        ("def jugde(completion): return 1.0", "no function 'judge'; it has jugde"),
        ("def judge(text): return 1.0", r"takes \(text\); name its parameters completion"),
    ],
)
def test_a_file_that_holds_no_such_reward_is_refused_with_the_fact(tmp_path, source, complaint):
    with pytest.raises(ValueError, match=complaint):
        load(write(tmp_path, source), {})


@pytest.mark.parametrize(
    ("use", "complaint"),
    [
        ("mathh", "did you mean math"),
        ("nowhere.py", "path/to/file.py:function"),
        ("nowhere.py:judge", "cannot be read .No such file"),
        ("no_such_package.rewards:judge", "no module 'no_such_package.rewards'"),
    ],
)
def test_a_reward_that_is_not_there_is_refused_with_the_fix(use, complaint):
    with pytest.raises(ValueError, match=complaint):
        resolve(use)


def test_a_reward_of_an_installed_package_is_found_by_its_entry_point(tmp_path, monkeypatch):
    (tmp_path / "even_digits_plugin.py").write_text("def judge(completion): return 2.0\n")
    metadata = tmp_path / "even_digits-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: even-digits\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[slipstream_rl.rewards]\neven_digits = even_digits_plugin:judge\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert call("even_digits") == 2.0


def test_resolving_the_built_ins_imports_none_of_them():
    resolving = "".join(f"resolve({name!r});" for name in BUILT_INS)
    script = f"import sys; from rewards.loading import resolve; {resolving} print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {"reasoning_gym", "math_verify", "sympy", "numpy", "torch", "rewards.math_answer"} & set(modules)
