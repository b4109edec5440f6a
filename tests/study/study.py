"""This file reruns the study: `make study` does the laboratory and writes docs/study.md from what it found.

make study                                   lag and curriculum in the laboratory, plots, page
make study ARGS="--real"                     and six runs of SmolLM2, hours; those under runs/study are not repeated
make study ARGS="--page"                     only plots and page, from the JSON that is there
make study ARGS="--uniform DIR... --curriculum DIR..."    and the real-model part from these run directories
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.study import figures, real_model
from tests.study.intervals import rounded
from tests.study.lag import study_lag
from tests.study.page import page
from tests.study.teaching import study_teaching

DOCS = Path(__file__).resolve().parents[2] / "docs"
RESULTS = DOCS / "study"
DRAWINGS = {"lag": figures.draw_lag, "curriculum": figures.draw_teaching, "real_model": figures.draw_real_model}


STUDIES = {"curriculum": study_teaching, "lag": study_lag}


def laboratory(names: Sequence[str]) -> None:
    """These studies in the laboratory, on all cores."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(os.cpu_count(), initializer=_one_thread) as pool:
        for name in names:
            write(name, STUDIES[name](lambda function, cells: pool.map(function, cells, chunksize=1)))
            print(f"{RESULTS / name}.json", flush=True)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def write(name: str, result: dict[str, Any]) -> None:
    """One result as JSON, a line per innermost object or list, with short numbers."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(_dump(rounded(result)) + "\n", encoding="utf-8")


def _dump(value: Any, indent: str = "") -> str:
    inside = indent + " "
    if isinstance(value, dict) and any(isinstance(item, dict) for item in value.values()):
        rows = [f"{inside}{json.dumps(key)}: {_dump(item, inside)}" for key, item in value.items()]
        return "{\n" + ",\n".join(rows) + f"\n{indent}}}"
    return json.dumps(value)


def draw_and_write_page() -> None:
    """Plots and page, from the JSON alone."""
    found = {
        name: json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        for name in DRAWINGS
        if (RESULTS / f"{name}.json").exists()
    }
    for name, result in found.items():
        DRAWINGS[name](result, RESULTS / f"{name}.svg")
    (DOCS / "study.md").write_text(page(found), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=STUDIES, nargs="+", default=list(STUDIES), help="of the laboratory's parts")
    parser.add_argument("--page", action="store_true", help="measure nothing")
    parser.add_argument("--real", action="store_true", help="train SmolLM2, with each arm and seed")
    for arm in real_model.ARMS:
        parser.add_argument(f"--{arm}", nargs="+", default=[], help="run directories of that arm")
    given = parser.parse_args(arguments)
    out = str(RESULTS / "real_model.json")
    if not given.page:
        laboratory(given.only)
    if given.real:
        real_model.main(["run", "--out", out])
    elif given.uniform:
        real_model.main(["summarise", "--uniform", *given.uniform, "--curriculum", *given.curriculum, "--out", out])
    draw_and_write_page()


if __name__ == "__main__":
    main()
