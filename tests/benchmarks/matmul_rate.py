"""This file measures what the machine can do at most, a program of its own: bf16 products on all cores, in GFLOP/s."""

from __future__ import annotations

import os
import statistics
import time

SIZE, ROUNDS = 2048, 9


def main() -> float:
    """The median rate of large square products."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    left, right = (torch.randn(SIZE, SIZE, dtype=torch.bfloat16) for _ in range(2))
    torch.mm(left, right)
    taken = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        torch.mm(left, right)
        taken.append(time.perf_counter() - start)
    return 2 * SIZE**3 / statistics.median(taken) / 1e9


if __name__ == "__main__":
    print(main())
