"""This file writes docs/study.md from the study's JSON: no number of the page is typed by hand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tests.study.lag import PACE, STRESS

TITLES = {
    "gentle": "the pace of the default run, for longer",
    "tuned": "the best learning rate at lag 0",
    "stress": f"{STRESS:.0f} times that",
}


def page(found: dict[str, Any]) -> str:
    """The whole page; `found` maps lag, curriculum and, where it was measured, real_model to their JSON."""
    parts = [_head(found), _lag(found["lag"]), _curriculum(found["curriculum"])]
    parts.append(_real_model(found["real_model"]) if "real_model" in found else _no_real_model())
    return "\n".join([*parts, _defaults(found), _not_shown()])


def percent(interval: list[float | None], digits: int = 0) -> str:
    """A share as 97 % [95, 99]."""
    mean, low, high = (None if value is None else f"{100 * value:.{digits}f}" for value in interval)
    return f"{mean} %" if low is None else f"{mean} % [{low}, {high}]"


def number(interval: list[float | None], digits: int = 3) -> str:
    """A number as 0.25 [0.24, 0.26]."""
    mean, low, high = (None if value is None else f"{value:.{digits}f}" for value in interval)
    return f"{mean}" if low is None else f"{mean} [{low}, {high}]"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def verdict(interval: list[float], bound: float, above: bool = True) -> str:
    """Whether a mean is on the wanted side of a bound, and whether its whole interval is."""
    mean, low, high = interval if above else [-value for value in (interval[0], interval[2], interval[1])]
    limit = bound if above else -bound
    if low >= limit:
        return "met, by the whole interval"
    if mean >= limit:
        return "met by the mean, not by the whole interval"
    return "not met by the mean, though the interval reaches it" if high >= limit else "not met"


def _head(found: dict[str, Any]) -> str:
    uniform = found["curriculum"]["table"]["short run"]["uniform"]
    return f"""# Study: what lag costs, and what the curriculum is worth

Written by `make study` from `docs/study/*.json`; edit `tests/study/page.py`, not this page. Brackets are 95 %
intervals: Student's t over seeds for means, a bootstrap over paired seeds for ratios.

**Asked.** (a) How much of the gain in quality is left when the data is k policy versions old, for each published
correction? (b) What is drawing prompts by difficulty worth, against drawing them evenly, at equal sampled tokens?

**The laboratory** (`learners/ladder.py`, `learners/laboratory.py`). An answer is a string of tokens, one per skill that
its level asks for, and is right if all are: the pass rate of a level is a product of softmax probabilities, so quality
(the mean pass rate over the levels) is exact and its optimum is 1. Levels, weights and first pass rates are those of
`configs/arithmetic.yaml` on SmolLM2-135M-Instruct; a level asks for the skills of those below it and for one or two
more. Advantages, losses, aggregations, AdamW, Gate and Curriculum are the run's own code. All skills share all
parameters through an orthogonal matrix: with parameters of its own per skill, AdamW would let a skill learn as fast
from one group in a hundred as from all of them, which no network does. The sampler's logits differ from the learner's
by noise of 0.05 nats, as the engine's do. Learning rates are of this toy.
At {PACE}, 24 steps of uniform draws gain {number(uniform["gain"], 2)} with a useful fraction of
{percent(uniform["useful_fraction"])}{_pace_of_the_model(found)}.
"""


def _pace_of_the_model(found: dict[str, Any]) -> str:
    if "real_model" not in found:
        return ""
    uniform = found["real_model"]["arms"]["uniform"]
    gain = uniform["final_accuracy"][0] - uniform["curve"][0][0]
    return f"; so many of SmolLM2 gain {gain:.2f} (greedy), {percent(uniform['useful_fraction'])}"


def _lag(study: dict[str, Any]) -> str:
    default = study["default"]
    shown = []
    for regime, arms in study["regimes"].items():
        lags = list(next(iter(arms.values()))["lags"])
        rows = [
            [f"**{arm}**" if arm == default else arm, f"{found['lr']:g}", number(found["lags"]["0"]["gain"], 2)]
            + [percent(found["lags"][lag]["kept"]) for lag in lags[1:]]
            for arm, found in arms.items()
        ]
        effective = ", ".join(f"{arms[default]['lags'][lag]['effective_sample_fraction']:.2f}" for lag in lags)
        head = ["algorithm", "lr", "gain at lag 0", *(f"lag {lag}" for lag in lags[1:])]
        shown.append(
            f"### {regime.capitalize()}: {TITLES[regime]}, {study['steps'][regime]} steps\n\n{table(head, rows)}\n\n"
            f"Effective sample fraction of {default} at lags {', '.join(lags)}: {effective}.\n"
        )
    kept = {regime: arms[default]["lags"]["4"]["kept"] for regime, arms in study["regimes"].items()}
    verdicts = "\n".join(
        f"- {regime}: {percent(value, 1)} of the gain at lag 0 is kept at lag 4: {verdict(value, 0.95)}"
        for regime, value in kept.items()
    )
    return f"""## (a) Quality against lag

**Protocol.** {study["seeds"]} seeds; every group is exactly k versions old (the first k steps use the first policy),
uniform draws, 8 groups of 8 answers per step, groups without signal drawn again. Algorithms have their published knobs.
*gentle*: learning rate {PACE} for all. *tuned*: for each algorithm the rate of {study["tuned_lrs"]} with the largest
gain at lag 0, kept for all lags. *stress*: {STRESS:.0f} times that rate. Cells are gains in quality as shares of the
same algorithm's gain at lag 0. *through the gate* takes max_lag = k instead, with groups that overtake each other.

![gain in quality against lag](study/lag.svg)

**At least 95 % of the gain at lag 4 with the default algorithm, {default}:**

{verdicts}

{chr(10).join(shown)}
Reading. With one step per batch, `decoupled` with the recomputed anchor is `cispo`: u is 1, its clip cannot act, and
what is left is a capped weight. `aipo` and `tis` differ by their caps, which are rarely reached. At the pace of the
default run nothing needs correcting up to lag 8; only `gspo` loses by its clip. At the best learning rate those lose
most that clip by the distance from the *sampling* policy (`grpo`, `dapo`, `dr_grpo`, `rloo`, `reinforce_pp`): the lag
alone uses up their trust region, and tokens without gradient are lost data. At a step that is far too large
the order turns: there a trust region of whatever
kind holds the policy back, and weights without one (`cispo`, `aipo`, `tis`, `m2po`) end lower; shares say little where
the gain at lag 0 is itself low. The anchor that is interpolated by lag (`decoupled, log-linear`) is near the best in
all three. `gspo`'s published clip of 3e-4 is made for answers of thousands of tokens, over which a mean of log r hardly
varies; on short answers it leaves out most as soon as engine and learner differ at all, and a clip of 0.2 mends that.
"""


def _curriculum(study: dict[str, Any]) -> str:
    head = [
        "draws",
        "gain at equal tokens",
        "over uniform",
        "tokens to uniform's end",
        "useful fraction",
        "of uniform's",
    ]
    sections = []
    for setting, arms in study["table"].items():
        knobs = study["settings"][setting]
        rows = [
            [
                arm,
                number(found["gain"]),
                number(found["gain_over_uniform"]),
                _reach(found["tokens_to_uniform"]),
                percent(found["useful_fraction"]),
                "× " + number(found["useful_over_uniform"], 2),
            ]
            for arm, found in arms.items()
        ]
        tokens = arms["uniform"]["tokens"][0]
        sections.append(
            f"### {setting.capitalize()}: lr {knobs['lr']:g}, uniform's {knobs['steps']} steps, {tokens:.0f} tokens\n\n"
            f"{table(head, rows)}\n"
        )
    default = study["table"]["short run"]["band"]
    knobs = ", ".join(f"{name} {value}" for name, value in study["default"].items())
    return f"""## (b) Curriculum against uniform draws, in the laboratory

**Protocol.** {study["seeds"]} seeds, the same first policies for all arms; max_lag {study["max_lag"]} through the gate;
`cispo`. Uniform makes its steps; what it sampled, dropped groups included, is the budget of the others. *band* is
the default ({knobs}); the rows below it change one knob. A token is useful if its group was trained: the rewards of
such a group differ, so that no advantage is 0.

![quality against sampled tokens](study/curriculum.svg)

- Uniform's final quality with at most 60 % of its tokens, in the short run:
  {_reach(default["tokens_to_uniform"])}: {_reach_verdict(default["tokens_to_uniform"])}
- Useful fraction at least twice uniform's, in the short run:
  × {number(default["useful_over_uniform"], 2)}: {verdict(default["useful_over_uniform"], 2.0)}

{chr(10).join(sections)}
Reading. While most levels are hopeless, uniform pays for groups that teach nothing, and the band saves them. That
advantage shrinks as the policy climbs, and in *fast* it is a loss: once the first levels are mastered, a band that
begins at 0.2 leaves the next ones alone until one answer in five is right, although a rare right answer among eight is
what opens them, and uniform draws find those. The useful fraction is not the aim: there it is higher, and the gain
lower. A lower `band_low` gives up some tokens at the start and is better where levels open quickly. Linked levels are
not what makes the band win a short run: with nothing in common between levels it wins by as much.
"""


def _reach(found: dict[str, Any]) -> str:
    if found["mean"] is not None:
        return percent(found["mean"])
    median = found["median"]
    middle = f"median {100 * median:.0f} %" if median is not None else "not reached by the median seed"
    return f"{middle}; {found['reached']} of {found['of']} seeds"


def _reach_verdict(found: dict[str, Any]) -> str:
    return (
        "not shown, since not every run got there"
        if found["mean"] is None
        else verdict(found["mean"], 0.6, above=False)
    )


def _real_model(study: dict[str, Any]) -> str:
    arms, equal = study["arms"], study["accuracy_at_equal_tokens"]
    rows = [
        [
            arm,
            f"{found['sampled_tokens'][0]:.0f}",
            percent(found["final_accuracy"], 1),
            percent(equal[arm], 1),
            percent(found["useful_fraction"]),
        ]
        for arm, found in arms.items()
    ]
    head = ["draws", "sampled tokens, in all", "final accuracy", "accuracy at equal tokens", "useful fraction"]
    of_means = study["of_mean_curves"]
    means = "not within the runs" if of_means is None else f"{100 * of_means:.0f} %"
    each = ", ".join(
        f"not by its end, at {100 * end:.0f} %" if share is None else f"{100 * share:.0f} %"
        for share, end in zip(study["tokens_to_uniform"]["each"], study["ended_at"], strict=True)
    )
    return f"""## (b) Curriculum against uniform draws, on SmolLM2-135M-Instruct

**Protocol.** `configs/arithmetic.yaml` with both values of `curriculum.name`, seeds {study["seeds"]}; held-out
accuracy is greedy, over 312 prompts, 24 of each level. Few seeds: the intervals are wide, and single prompts decide
when a run "keeps" an accuracy.

![held-out accuracy against sampled tokens](study/real_model.svg)

{table(head, rows)}

- Tokens to reach, and keep, uniform's final accuracy, of uniform's (at most 60 % was asked):
  {_reach(study["tokens_to_uniform"])}: {_reach_verdict(study["tokens_to_uniform"])}. Seed by seed: {each}. By the mean
  curves: {means}.
- Accuracy at equal tokens ({study["equal_tokens"][0]:.0f}, where the shorter run of a pair ends), difference of pairs:
  {percent(equal["difference"], 1)}.
- Useful fraction: × {number(study["useful_over_uniform"], 2)} of uniform's (twice was asked:
  {verdict(study["useful_over_uniform"], 2.0)}).
"""


def _no_real_model() -> str:
    return """## (b) Curriculum against uniform draws, on SmolLM2-135M-Instruct

Not measured yet: `make study ARGS=--real`.
"""


def _defaults(found: dict[str, Any]) -> str:
    lag, band = found["lag"], found["curriculum"]["default"]
    arms = {regime: found for regime, found in lag["regimes"].items()}
    named = "; ".join(
        f"`{arm}` " + ", ".join(number(regime[arm]["lags"]["4"]["gain"], 2) for regime in arms.values())
        for arm in (lag["default"], "decoupled, log-linear", "grpo")
    )
    at_two = [percent(regime[lag["default"]]["lags"]["2"]["kept"]) for regime in arms.values()]
    settings = found["curriculum"]["table"]
    reaches = "; ".join(
        f"{low}: " + ", ".join(_reach(arms[f"band from {low}"]["tokens_to_uniform"]) for arms in settings.values())
        for low in ("0.2", "0.1", "0.05")
    )
    return f"""## What the defaults follow from

- `algorithm.name: {lag["default"]}`. Gain at lag 4, in the three regimes: {named}. A run whose
  `policy/effective_sample_fraction` is below about 0.8 has left the range in which the default keeps 95 %: lower the
  step, or take `decoupled` with `anchor: log_linear`.
- `staleness.max_lag: {found["curriculum"]["max_lag"]}`: at that lag the default keeps {", ".join(at_two)} in the three.
- `curriculum.name: {band["name"]}`, `band_low: {band["band_low"]}`, `band_high: {band["band_high"]}`. Tokens to
  uniform's end by `band_low`, in {", ".join(settings)}: {reaches}.
- `rollout.first_answers: null`: it helps uniform draws, whose groups mostly agree, and not those of the band.
"""


def _not_shown() -> str:
    return """## What this does not show

- The laboratory has no generalisation, no generated text and no time: a prompt is its level, and a group is of one
  version. It ranks corrections by what they do with the lag's ratios, not by what a large model does with them.
- The ratios of lag in long answers of large models have heavier tails than here; caps and masks that are idle here may
  matter there.
- The chances of skills that SmolLM2 never showed are guesses. The long and the fast setting depend on them.
- Learning rates are tuned at lag 0 only, as the question asks, and on the seeds that are then reported; a rate tuned
  per lag was not tried.
- The laboratory was looked at before it was fixed. A first form had parameters of its own for each skill, without the
  orthogonal matrix; there, too, the curriculum did better at slow paces and lost at fast ones. The pace was first twice
  the one above, and was halved to meet the uniform runs of SmolLM2; the curriculum does better the slower it is. So the
  short run stands for a model that learns this slowly, and *fast* for what happens when one does not.
"""
