"""This file gives learner tests one learner at a time: a process can be in one group of ranks only."""

from __future__ import annotations

import pytest
import torch

from tests.learners.tiny import make_learner


@pytest.fixture
def only_learner():
    """Makes a learner of settings and groups, and closes the one before it; the test's last one is closed after it."""
    made = []

    def make(settings, groups, dtype=torch.float64):
        while made:
            made.pop().close()
        made.append(make_learner(settings, groups, dtype=dtype))
        return made[-1]

    yield make
    while made:
        made.pop().close()
