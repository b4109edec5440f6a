from __future__ import annotations

import msgspec
import pytest

from rl.weights import (
    NcclGroup,
    TensorDigest,
    UpdateReceipt,
    WeightUpdate,
    WeightUpdateError,
    combined,
    digest_of,
    verify,
)

TENSORS = (TensorDigest("a.weight", "bfloat16", (2, 3), "aa"), TensorDigest("b.weight", "bfloat16", (4,), "bb"))


def make_update(version: int = 1, tensors=TENSORS, **changes) -> WeightUpdate:
    fields = {
        "version": version,
        "backend": "shared_memory",
        "tensors": tensors,
        "digest": combined(tensors),
        "canary_token_ids": (1, 2, 3),
        "canary_logprobs": (-1.0, -2.0),
        "path": None,
        "node": "here",
        "num_bytes": 20,
    }
    return WeightUpdate(**fields | changes)


def make_receipt(**changes) -> UpdateReceipt:
    fields = {
        "version": 1,
        "tensors": TENSORS,
        "missing": (),
        "canary_logprobs": (-1.1, -1.9),
        "seconds": {"load": 1.0},
        "generator": 3,
    }
    return UpdateReceipt(**fields | changes)


def test_a_faithful_receipt_gives_the_canary_gap():
    assert verify(make_update(), make_receipt(), None, max_canary_gap=0.2) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"tensors": TENSORS[:1]}, "sent but not received: b.weight"),
        ({"tensors": (*TENSORS, TensorDigest("c", "bfloat16", (1,), "cc"))}, "received but not sent: c"),
        ({"tensors": (TENSORS[0], TensorDigest("b.weight", "bfloat16", (4,), "xx"))}, "other bytes .*: b.weight"),
        ({"tensors": (TENSORS[0], TensorDigest("b.weight", "float32", (4,), "bb"))}, "other bytes .*: b.weight"),
        ({"missing": ("q.weight",)}, "filled by no received tensor: q.weight"),
        ({"version": 0}, "still stamps its tokens with version 0"),
        ({"canary_logprobs": (-3.0, -4.0)}, "scores the canary 2.0000 nats"),
        ({"canary_logprobs": (float("nan"), -2.0)}, "scores the canary nan nats"),
        ({"canary_logprobs": (-1.0,)}, "scored 2 canary tokens, the engine 1"),
    ],
)
def test_an_unfaithful_receipt_is_refused_by_name(changes, complaint):
    with pytest.raises(WeightUpdateError, match=complaint):
        verify(make_update(), make_receipt(**changes), None, max_canary_gap=0.2)


def test_every_complaint_about_a_receipt_names_the_generator_and_the_version():
    with pytest.raises(WeightUpdateError, match="generator 3, policy version 1"):
        verify(make_update(), make_receipt(missing=("q",)), None, max_canary_gap=0.2)


def test_weights_that_did_not_change_though_the_optimizer_moved_are_a_frozen_sender():
    with pytest.raises(WeightUpdateError, match="every weight equals version 0.*a.weight"):
        verify(make_update(), make_receipt(), make_update(version=0), max_canary_gap=0.2)


def test_weights_may_stay_equal_where_the_step_was_zero():
    verify(make_update(moved=False), make_receipt(), make_update(version=0), max_canary_gap=0.2)


def test_long_lists_of_parameters_are_cut_short():
    lost = tuple(TensorDigest(f"layer.{index:02d}", "bfloat16", (1,), "x") for index in range(20))
    with pytest.raises(WeightUpdateError, match="layer.04 and 15 more"):
        verify(make_update(tensors=lost), make_receipt(tensors=()), None, max_canary_gap=0.2)


def test_the_combined_digest_ignores_order_and_sees_every_field():
    assert combined(TENSORS) == combined(reversed(TENSORS))
    changes = ({"name": "z"}, {"dtype": "float32"}, {"shape": (3, 2)}, {"digest": "zz"})
    others = [combined((msgspec.structs.replace(TENSORS[0], **change), TENSORS[1])) for change in changes]
    assert len({combined(TENSORS), *others}) == 5


def test_a_digest_is_of_the_bytes_whatever_holds_them():
    assert digest_of(b"abcd") == digest_of(memoryview(bytearray(b"abcd"))) != digest_of(b"abce")


@pytest.mark.parametrize(
    "held, node, here, path",
    [
        ("base", "there", False, "delta"),
        ("base", "here", False, "whole"),
        ("base", "here", True, "delta"),
        ("another", "there", True, "whole"),
        (None, "there", True, "whole"),
    ],
)
def test_a_delta_is_for_those_who_hold_its_base_and_do_not_see_the_whole_file(held, node, here, path):
    delta = {"path": "whole", "delta_path": "delta", "base_version": 0, "base_digest": "base", "delta_here": here}
    update = make_update(**delta)
    holds = make_update(version=0, digest=held) if held else None
    fitting = update.for_holder(holds, node)
    assert fitting.path == path and fitting.tensors == update.tensors
    assert make_update(path="whole").for_holder(holds, node).path == "whole"


def test_an_update_survives_the_wire():
    update = make_update()
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(update), type=WeightUpdate) == update


def test_every_engine_worker_has_a_rank_of_its_own_after_the_sender():
    group = NcclGroup(address="127.0.0.1", port=1, engines=2, workers=2)
    ranks = [group.rank_offset(engine) + worker for engine in range(2) for worker in range(2)]
    assert ranks == [1, 2, 3, 4] and group.world_size == 5
