"""This file tests choosers of one's own: they load by path, and wrong paths are refused unimported."""

from __future__ import annotations

import json
import pathlib

import pytest

from rl.chooser import check_name
from rl.curriculum import Curriculum
from rl.curriculum_config import CurriculumSection

LEVELS = {"sums": ("easy", "hard")}
ROUND_ROBIN = """
from rl.chooser import Choice, Reason

class RoundRobin:
    def __init__(self, setup, offset=0):
        self.places = [(source, level) for source, levels in setup.levels.items() for level in levels]
        self.next, self.seen, self.beliefs = offset, 0, setup.beliefs

    def draw(self, version):
        source, level = self.places[self.next % len(self.places)]
        self.next += 1
        return Choice(source, level, Reason(why="its turn", version=version, notes={"number": self.next}))

    def observe(self, feedback):
        self.seen += 1

    def metrics(self):
        return {}

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]

class Half:
    def __init__(self, setup):
        pass

    def draw(self, version): ...
"""


@pytest.fixture
def path(tmp_path: pathlib.Path) -> str:
    file = tmp_path / "turns.py"
    file.write_text(ROUND_ROBIN)
    return str(file)


def curriculum_of(name: str, **params) -> Curriculum:
    section = CurriculumSection(name=name, params=params, max_uninformative_steps=2)
    return Curriculum(LEVELS, {"sums": 1.0}, section, 8, 0)


def test_a_class_of_a_file_chooses_with_its_params_and_its_reasons(path: str) -> None:
    curriculum = curriculum_of(f"{path}:RoundRobin", offset=1)
    choices = [curriculum.draw(3) for _ in range(3)]
    assert [choice.level for choice in choices] == ["hard", "easy", "hard"]
    assert choices[0].why == "its turn" and choices[0].reason.notes == {"number": 2}
    assert curriculum.metrics()["curriculum/draws/sums/hard"].value == 2


def test_a_class_of_a_module_chooses_too(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(pathlib.Path(path).parent))
    assert curriculum_of("turns:RoundRobin").draw(0).level == "easy"


def test_its_state_is_saved_and_its_groups_without_signal_are_bounded(path: str) -> None:
    curriculum, restored = (curriculum_of(f"{path}:RoundRobin") for _ in range(2))
    curriculum.draw(0)
    for _ in range(7):
        curriculum.observe("sums", "easy", 0.0, False, 0)
    restored.load_state_dict(json.loads(json.dumps(curriculum.state_dict())))
    assert restored.draw(0) == curriculum.draw(0)
    restored.check_signal(groups_per_step=4)
    restored.observe("sums", "easy", 0.0, False, 0)
    with pytest.raises(ValueError, match=r"8 groups in a row .*sums/easy 0\.00, sums/hard unseen"):
        restored.check_signal(groups_per_step=4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{path}:Turns", "has no class Turns; it has RoundRobin, Half"),
        ("{path}x.py:Turns", "cannot be read .No such file"),
        ("no_such_package.turns:Turns", "there is no module 'no_such_package.turns'; install its package"),
        ("{path}:not a name", "neither module:Class nor path/to/file.py:Class"),
    ],
)
def test_a_wrong_path_is_refused_without_importing_anything(path: str, name: str, message: str) -> None:
    pathlib.Path(path).write_text(ROUND_ROBIN + "\nraise SystemExit\n")
    with pytest.raises(ValueError, match=message):
        check_name(name.format(path=path))


def test_the_name_of_a_built_in_one_is_right(path: str) -> None:
    check_name("band")
    check_name(f"{path}:RoundRobin")


@pytest.mark.parametrize(
    ("source", "cls", "message"),
    [
        ("def broken(:", "RoundRobin", "line 1: .*correct it"),
        ("raise RuntimeError('no network')\nclass Turns: ...", "Turns", "does not import: RuntimeError: no network"),
        (ROUND_ROBIN, "Half", "lacks observe, metrics, state_dict, load_state_dict"),
        ("class Turns:\n    def __init__(self): ...", "Turns", "does not take the setup and {}"),
    ],
)
def test_what_does_not_load_is_refused_with_the_reason(path: str, source: str, cls: str, message: str) -> None:
    pathlib.Path(path).write_text(source)
    with pytest.raises(ValueError, match=message):
        curriculum_of(f"{path}:{cls}")
