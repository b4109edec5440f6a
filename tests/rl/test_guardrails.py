"""This file tests the guardrails: when a rule acts, what the gate then admits, and when it is given back."""

from __future__ import annotations

import math
import secrets

import msgspec
import pytest
from pydantic import ValidationError

from rl.buffer import Buffer, BufferLimits
from rl.config import Guardrail
from rl.guardrails import RUN_ACTIONS, STEP_ACTIONS, GateGuard, Guardrails, GuardrailStop, check_names
from rl.metrics import mean, total
from rl.orders import COMPUTED_TOKENS
from rl.staleness import Gate
from tests.fakes import make_run


@pytest.fixture
async def buffer(redis_url):
    run_id = f"run-{secrets.token_hex(4)}"
    connected = await Buffer.connect(redis_url, run_id, BufferLimits(1 << 20, 1 << 10))
    connected.run_id = run_id
    yield connected
    await connected.delete_run()
    await connected.close()


ESS = "policy/effective_sample_fraction"


def rule(action: str, **given) -> Guardrail:
    return Guardrail.model_validate({"metric": ESS, "below": 0.5, "action": action} | given)


def seen(value: float) -> dict:
    return {ESS: mean(value)}


def test_a_rule_acts_after_its_steps_in_a_row_and_starts_again_once_the_metric_is_in_bounds():
    guardrails = Guardrails({"ess": rule("skip_step", steps=2)}, STEP_ACTIONS)
    assert [bool(guardrails.judge(seen(value))) for value in (0.4, 0.6, 0.4, 0.4, 0.4, 0.6)] == [0, 0, 0, 1, 1, 0]


def test_a_trip_says_what_it_saw_and_what_was_allowed():
    (trip,) = Guardrails({"ess": rule("lower_step", factor=0.25)}, STEP_ACTIONS).judge(seen(0.125))
    assert str(trip) == f"guardrail ess: {ESS} is 0.125, below 0.5" and trip.factor == 0.25


def test_the_value_at_the_bound_is_allowed_and_nan_never_is():
    upper = Guardrails({"gap": rule("stop", below=None, above=0.5)}, RUN_ACTIONS)
    assert not upper.judge(seen(0.5)) and upper.judge(seen(0.51)) and upper.judge(seen(math.nan))


def test_rules_of_other_actions_and_absent_metrics_change_nothing():
    guardrails = Guardrails({"ess": rule("skip_step"), "end": rule("stop")}, STEP_ACTIONS)
    assert [trip.name for trip in guardrails.judge(seen(0.1))] == ["ess"]
    assert guardrails.judge({}) == ()


def test_counting_goes_on_from_a_saved_state():
    rules = {"ess": rule("skip_step", steps=2)}
    before, after = Guardrails(rules, STEP_ACTIONS), Guardrails(rules, STEP_ACTIONS)
    before.judge(seen(0.1))
    after.load_state_dict(before.state_dict())
    assert after.judge(seen(0.1))


def test_the_gate_loses_a_version_per_bad_step_and_gets_one_back_after_each_calm_spell():
    gate = Gate(max_lag=2, groups_per_step=4)
    guard = GateGuard({"ess": rule("tighten_gate", hold_steps=2)}, gate)
    lags = []
    for value in (1.0, 0.1, 0.1, 0.1, 1.0, 1.0, 0.1, 1.0, 1.0, 1.0, 1.0, 1.0):
        guard.judge(seen(value))
        lags.append(gate.allowed_lag)
    assert lags == [2, 1, 0, 0, 0, 1, 0, 0, 1, 1, 2, 2]


def test_a_tightened_gate_admits_less_and_never_asks_back_what_it_admitted():
    gate = Gate(max_lag=2, groups_per_step=4)
    for _ in range(12):
        gate.admit()
    gate.tighten()
    assert gate.room(0) == 0 and gate.running == 12
    assert gate.room(1) == 0 and gate.room(2) == 4
    assert gate.is_fresh(2, 0), "what was sampled within max_lag may be trained"


def test_a_rule_with_two_bounds_or_none_is_refused():
    for bounds in ({"above": 1.0}, {"below": None}):
        with pytest.raises(ValidationError, match="exactly one of above and below"):
            rule("stop", **bounds)


def test_a_rule_that_watches_what_nobody_reports_is_refused_with_the_nearest_names():
    with pytest.raises(ValueError, match="did you mean policy/effective_sample_fraction"):
        check_names({"ess": rule("stop", metric="policy/effective_sample_size")}, seen(1.0), {})
    with pytest.raises(ValueError, match="among what the learner knows before its step"):
        check_names({"ess": rule("skip_step")}, seen(1.0), {})
    with pytest.raises(ValueError, match="among what the learner knows before its step"):
        check_names({"lr": rule("skip_step", metric="learner/lr")}, {}, {"learner/lr": mean(1.0)})
    check_names({"old": rule("stop", metric="policy/by_lag/9-16/effective_sample_fraction")}, seen(1.0), {})


async def test_a_run_whose_metric_leaves_its_bounds_tightens_the_gate_and_says_so(tmp_path, buffer):
    run = make_run(tmp_path / buffer.run_id, buffer, guardrails={"ess": rule("tighten_gate", hold_steps=99)})
    run.parts.learners.effective_sample_fraction = 0.1
    assert await run.main() == "finished"
    assert run.parts.gate.allowed_lag == 0
    events = (run.parts.recorder.directory.path / "events.jsonl").read_text()
    assert '"event":"guardrail"' in events.replace(" ", "") and "is 0.1, below 0.5" in events


async def test_a_rule_that_stops_ends_the_run_with_its_reason(tmp_path, buffer):
    run = make_run(tmp_path / buffer.run_id, buffer, guardrails={"ess": rule("stop", steps=3)})
    run.parts.learners.effective_sample_fraction = 0.1
    with pytest.raises(GuardrailStop, match="below 0.5 for 3 steps or more, so the run stops"):
        await run.main()
    assert run.step == 3


async def test_names_are_checked_at_the_first_step_that_has_a_gradient(tmp_path, buffer):
    run = make_run(tmp_path / buffer.run_id, buffer, guardrails={"gap": rule("stop", metric="policy/no_such_metric")})
    make, seen_at = run.parts.learners.step, []

    async def without_gradient_at_first(order):
        report = await make(order)
        seen_at.append(report.step)
        computed = {COMPUTED_TOKENS: total(0 if report.step == 1 else 8)}
        return msgspec.structs.replace(report, metrics=report.metrics | computed)

    run.parts.learners.step = without_gradient_at_first
    with pytest.raises(ValueError, match="'policy/no_such_metric' is not among"):
        await run.main()
    assert seen_at == [1, 2]
