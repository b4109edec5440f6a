"""This file writes docs/algorithms.md from the tables, docstrings and knobs of the code and from the table of oracles.

python -m tests.learners.algorithms_page      # make docs
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable, Iterable
from typing import get_args

from learners import losses
from learners.advantages import ADVANTAGES
from learners.aggregations import AGGREGATIONS
from learners.penalties import DIVERGENCES, outside_band
from rl.algorithm_config import PRESETS, AlgorithmSection, RatioMask, ReferenceKl
from rl.section import Section
from tests.learners import oracles

PAGE = pathlib.Path(__file__).parent.parent.parent / "docs" / "algorithms.md"

HEAD = """# Algorithms

Written by `make docs` from the code; edit the docstrings, not this page. `algorithm.name` picks a row of the first
table, and `algorithm.advantage`, `algorithm.loss` and `algorithm.aggregation` replace one part of it each.

Notation, per sampled token: π the current policy, μ the one that sampled, r = π/μ, π_prox the anchor of a trust region,
u = π/π_prox, A the advantage, sg() no gradient; R_i the rewards of a group, m their mean, s their deviation. Losses are
minimised. A batch makes one optimizer step, so π_old, the policy at the start of the step, is sg(π).

Each row is compared in fp64, value and gradient with respect to log π, at a relative 1e-9, with what its last column
names, by `tests/learners/test_oracles.py`. *Formula in loops* is `tests/learners/oracles_literal.py`: the paper's
formula written out a second time, token by token, and differentiated by complex steps. *TRL* is that library's trainer
run on the same batch (`tests/learners/oracles_trl.py`), with every deviation of it from the papers named in
`tests/learners/oracles.py`.
"""


def page() -> str:
    """The whole page."""
    parts = [
        HEAD,
        "## Names\n",
        _table(("name", "advantage", "loss", "aggregation", "compared with"), map(_name_row, PRESETS)),
        "## Advantages\n",
        "A group whose scored rewards are all equal gets exactly 0 and has no share in statistics of the batch.\n",
        _table(("name", "formula", "source", "compared with"), (_advantage_row(*row) for row in ADVANTAGES.items())),
        "## Losses\n",
        _table(("name", "formula", "source", "knobs", "compared with"), map(_loss_row, _knobs_of_losses())),
        "## Aggregations\n",
        "What a token's loss is multiplied by before all are summed, counted before anything is masked.\n",
        _table(("name", "formula", "source", "compared with"), (_aggregation_row(*r) for r in AGGREGATIONS.items())),
        "## Around a loss\n",
        "A token that `mask` or `mask_truncated` leaves out counts for nothing: no loss, no pull, no bonus. One that\n"
        "its loss leaves out (icepop, dppo_tv, m2po) loses its policy term only. d = log π - log π_reference.\n",
        _table(("part", "formula", "source", "knobs", "compared with"), _surrounding_rows()),
    ]
    return "\n".join(parts)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows)]
    return "\n".join(lines) + "\n"


def _name_row(name: str) -> tuple[str, ...]:
    preset = PRESETS[name]
    knobs = ", ".join(f"{key} {value}" for key, value in preset["loss"].items() if key != "name")
    loss = preset["loss"]["name"] + (f" ({knobs})" if knobs else "")
    return (
        f"`{name}`",
        preset["advantage"],
        loss,
        preset["aggregation"],
        _compared(lambda section: section.name == name),
    )


def _advantage_row(name: str, function: Callable) -> tuple[str, ...]:
    found = dict.fromkeys(oracle.reference for oracle in oracles.ADVANTAGES if oracle.name == name)
    return f"`{name}`", _formula(function), _source(function), "; ".join(found)


def _loss_row(knobs: type[Section]) -> tuple[str, ...]:
    name = knobs.model_fields["name"].default
    function = getattr(losses, name)
    return (
        f"`{name}`",
        _formula(function),
        _source(function),
        _knobs(knobs),
        _compared(lambda section: section.loss.name == name),
    )


def _aggregation_row(name: str, function: Callable) -> tuple[str, ...]:
    return f"`{name}`", _formula(function), _source(function), _compared(lambda section: section.aggregation == name)


def _surrounding_rows() -> Iterable[tuple[str, ...]]:
    yield "`mask`", _formula(outside_band), "", _knobs(RatioMask), _compared(lambda section: section.mask is not None)
    yield (
        "`mask_truncated`",
        "`no token of an answer that was cut at rollout.max_tokens`",
        "arXiv 2503.14476",
        "",
        _compared(lambda section: section.mask_truncated),
    )
    for name, function in DIVERGENCES.items():
        compared = _compared(lambda section, name=name: section.kl is not None and section.kl.estimator == name)
        yield f"`kl` {name}", _formula(function), _source(function), _knobs(ReferenceKl), compared
    yield (
        "`entropy_coefficient`",
        "`- entropy_coefficient * entropy`",
        "",
        "entropy_coefficient 0.0",
        _compared(lambda section: section.entropy_coefficient > 0),
    )


def _knobs_of_losses() -> tuple[type[Section], ...]:
    return get_args(AlgorithmSection.model_fields["loss"].annotation)


def _compared(concerns: Callable[[AlgorithmSection], bool]) -> str:
    found = dict.fromkeys(oracle.reference for oracle in oracles.OBJECTIVES if concerns(oracle.section))
    return "; ".join(found)


def _formula(function: Callable) -> str:
    """The docstring's first line up to its source: the formula."""
    first = (function.__doc__ or "").splitlines()[0]
    return "`" + re.split(r"\. (?=[A-Z])|: (?=[a-z])|\.$", first)[0].replace("|", "\\|") + "`"


def _source(function: Callable) -> str:
    found = re.findall(r"arXiv [\d.]+\d|[\w.]+\.(?:net|site)/[\w/-]+|TRL|prime-rl|AReaL", function.__doc__ or "")
    return ", ".join(dict.fromkeys(found))


def _knobs(section: type[Section]) -> str:
    told = []
    for name, field in section.model_fields.items():
        default = "required" if field.is_required() else "none" if field.default is None else field.default
        if name != "name":
            told.append(f"{name} {default}")
    return ", ".join(told)


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
