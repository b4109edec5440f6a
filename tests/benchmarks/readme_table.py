"""This file writes the committed figures of docs/benchmarks/ into README.md, between the markers of each benchmark.

    python tests/benchmarks/readme_table.py

A benchmark `trl` stands between <!-- benchmark:trl --> and <!-- /benchmark:trl -->.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks.report import Table

ROOT = Path(__file__).resolve().parents[2]
README, KEPT = ROOT / "README.md", ROOT / "docs" / "benchmarks"


def tables_of(path: Path) -> list[Table]:
    """The tables of a JSON file that report.publish wrote."""
    kept = json.loads(path.read_text(encoding="utf-8"))["tables"]
    return [Table(each["title"], tuple(each["columns"]), tuple(map(tuple, each["rows"]))) for each in kept]


def placed(page: str, name: str, tables: Sequence[Table]) -> str:
    """The page with the tables between the benchmark's markers. ValueError where the page has not both, in order."""
    opening, closing = f"<!-- benchmark:{name} -->", f"<!-- /benchmark:{name} -->"
    before, found, rest = page.partition(opening)
    _, found_end, after = rest.partition(closing)
    if not (found and found_end):
        raise ValueError(f"the page lacks {opening} or, after it, {closing}; write both where the table belongs")
    return "\n".join([f"{before}{opening}", *(f"{table.markdown()}\n" for table in tables), f"{closing}{after}"])


def with_all(page: str) -> str:
    """The page with the tables of every file in docs/benchmarks/ that it has markers for."""
    for path in sorted(KEPT.glob("*.json")):
        if f"<!-- benchmark:{path.stem} -->" in page:
            page = placed(page, path.stem, tables_of(path))
    return page


if __name__ == "__main__":
    README.write_text(with_all(README.read_text(encoding="utf-8")), encoding="utf-8")
