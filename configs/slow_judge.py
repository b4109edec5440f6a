"""This file is a reward that takes seconds and no processor: it waits, as for a judge on another machine."""

from __future__ import annotations

import re
import threading


def remote_judge(completion: str, reference: str, seconds: float = 2.0) -> float:
    """1 where the last number of the answer is the reference, told after so many seconds."""
    threading.Event().wait(seconds)
    numbers = re.findall(r"-?\d+", completion)
    return float(bool(numbers) and numbers[-1] == reference)
