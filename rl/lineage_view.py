"""This file shows the answers of rl/lineage.py on a screen."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator, Mapping

from rich.console import Group as Screen
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from rl.chooser import Numbers
from rl.history import DrawFacts, Drop, Rollback, VersionFacts
from rl.lineage import GroupFacts, GroupLineage, Lineage, PromptLineage, StepLineage, VersionLineage

Rows = list[tuple[str, str]]


def render(lineage: Lineage) -> RenderableType:
    """The answer as tables, problems last."""
    match lineage:
        case StepLineage():
            parts = [_facts(f"step {lineage.step}", _of_step(lineage)), _groups(lineage.groups)]
        case GroupLineage():
            parts = [_facts(f"group {lineage.group}", _of_group(lineage))]
        case PromptLineage():
            parts = [_trained(lineage), *map(_dropped, lineage.dropped), _drawn(lineage)]
        case VersionLineage():
            parts = [_facts(f"policy version {lineage.facts.version}", _of_version(lineage)), _sampled(lineage)]
    problems = [Text.assemble(("problem  ", "bold red"), problem) for problem in lineage.problems]
    return Screen(*parts, *problems)


def _of_step(lineage: StepLineage) -> Rows:
    return [
        ("made", _times(lineage.made)),
        ("batch digest", lineage.batch_digest or "none: the step has not been made, or not again since a rollback"),
        ("trained from", _version(lineage.trained_from)),
        ("produced", _version(lineage.produced)),
        ("checkpoints", _checkpoints(lineage.checkpoints)),
        *(("rolled back", _rollback(rollback)) for rollback in lineage.rollbacks),
        ("groups", f"{len(lineage.group_ids)}" if lineage.groups else ", ".join(lineage.group_ids)),
    ]


def _of_group(lineage: GroupLineage) -> Rows:
    rows: Rows = [("state", lineage.state)]
    if lineage.given_up:
        rows.append(("planned before", f"for step {_listed(lineage.given_up)}, which was then made of other groups"))
    facts = lineage.facts
    if facts:
        finished = datetime.datetime.fromtimestamp(facts.finished_at).isoformat(" ", "seconds")
        rows += [
            ("draw", str(facts.draw)),
            ("prompt", f"{facts.prompt_id} (source {facts.source}, level {facts.level})"),
            ("sampled under", f"version {_listed(facts.versions)}, {facts.tokens} tokens, finished {finished}"),
            ("rewards", _rewards(facts)),
            ("reward versions", _reward_versions(facts)),
        ]
    if lineage.drawn:
        rows += [("drawn because", line) for line in _why(lineage.drawn)]
    return [*rows, ("checkpoints", _checkpoints(lineage.checkpoints))]


def _of_version(lineage: VersionLineage) -> Rows:
    facts = lineage.facts
    made_by = f"step {lineage.made_by}" if lineage.made_by else "nothing: these are the starting weights"
    return [
        ("made by", made_by),
        ("weight digest", facts.digest or "not recorded: it was never delivered"),
        *(("before a rollback", digest) for digest in facts.earlier_digests),
        ("verified by", f"generator {_listed(facts.generators)}" if facts.generators else "no generator, as recorded"),
        ("checkpoint", _checkpoints(lineage.checkpoints)),
        ("sampled", f"{sum(each.tokens for each in lineage.sampled)} trained tokens"),
    ]


def _facts(title: str, rows: Rows) -> Table:
    view = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    view.add_column(style="dim")
    view.add_column(overflow="fold")
    for name, value in rows:
        view.add_row(name, escape(value))
    return view


def _listing(*columns: str) -> Table:
    view = Table(box=None, pad_edge=False)
    for column in columns:
        view.add_column(column, overflow="fold")
    return view


def _groups(groups: Iterable[GroupFacts]) -> Table:
    view = _listing("group", "draw", "prompt", "versions", "rewards", "reward versions")
    for facts in groups:
        cells = (facts.group, str(facts.draw), facts.prompt_id, _listed(facts.versions))
        view.add_row(*map(escape, (*cells, _rewards(facts), _reward_versions(facts))))
    return view


def _trained(lineage: PromptLineage) -> Table:
    view = _listing("group", "state", "versions", "rewards")
    view.title, view.title_justify = escape(f"prompt {lineage.prompt_id}"), "left"
    for group in lineage.groups:
        facts = group.facts
        told = (_listed(facts.versions), _rewards(facts)) if facts else ("", "")
        view.add_row(*map(escape, (group.group, group.state, *told)))
    return view


WHY = {
    "uniform": "every level is drawn alike",
    "explore": "of all levels of its source it was drawn longest ago",
    "band": "the pass rate sampled from its belief lies in the band",
    "nearest": "no level's sampled pass rate lay in the band, and its promised most signal",
}
WHY_PROMPT = {
    "explore": "it came next in the epoch",
    "band": "the pass rate sampled from its belief lies in the band",
    "nearest": "no candidate's sampled pass rate lay in the band, and its promised most signal",
    "reprobe": "it was mastered long ago, and is looked at again",
}


def _why(drawn: DrawFacts) -> Iterator[str]:
    """Why a prompt was drawn: the source's turn, the level, the prompt."""
    reason = drawn.reason
    if reason.lender:
        yield f"source {reason.lender} lent its turn to {drawn.source}: it had less than half as much to teach"
    elif reason.credit is not None:
        yield f"source {drawn.source} was due {reason.credit:.2f} draws"
    yield f"level {drawn.level}: {_told(reason.why, WHY, reason.level)}, at version {reason.version}"
    if reason.signal is not None:
        yield f"its next group teaches with a chance of {reason.signal:.2f}"
    if reason.prompt_why:
        yield f"the prompt: {_told(reason.prompt_why, WHY_PROMPT, reason.prompt)}"
    yield from (f"{name}: {value}" for name, value in reason.notes.items())


def _told(why: str, words: Mapping[str, str], numbers: Numbers | None) -> str:
    told = f"{why}, {words[why]}" if why in words else why
    if numbers is None:
        return told
    sampled = "" if numbers.sampled is None else f", sampled {numbers.sampled:.2f}"
    return f"{told} (pass rate {numbers.pass_rate:.2f} from {numbers.answers:.1f} answers{sampled})"


def _drawn(lineage: PromptLineage) -> Table:
    rows = [(f"draw {drawn.draw} because", line) for drawn in lineage.draws for line in _why(drawn)]
    return _facts("", rows)


def _dropped(drop: Drop) -> Text:
    return Text(f"{drop.group}  dropped: {drop.reason}, {drop.tokens} tokens")


def _sampled(lineage: VersionLineage) -> Table:
    view = _listing("trained in step", "group", "tokens of this version")
    for each in lineage.sampled:
        view.add_row(str(each.step), escape(each.group), str(each.tokens))
    return view


def _version(facts: VersionFacts) -> str:
    return f"version {facts.version}, weights {facts.digest or 'not recorded'}"


def _rollback(rollback: Rollback) -> str:
    return f"from step {rollback.from_step} to {rollback.to_step}: {rollback.reason}"


def _checkpoints(steps: tuple[int, ...]) -> str:
    if not steps:
        return "none holds it"
    return f"step {steps[0]}" + (f", and {len(steps) - 1} more, the newest of step {steps[-1]}" if steps[1:] else "")


def _times(count: int) -> str:
    return {0: "not yet", 1: "once"}.get(count, f"{count} times: a rollback came in between")


def _rewards(facts: GroupFacts) -> str:
    return " ".join("failed" if reward is None else f"{reward:g}" for reward in facts.rewards)


def _reward_versions(facts: GroupFacts) -> str:
    return ", ".join(f"{name} {version}" for name, version in facts.reward_versions.items())


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))
