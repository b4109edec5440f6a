"""This file keeps what each step trained on, for ever: archive/step_N.parquet, one row per answer.

People read it with pandas; `Archive.read` gives back the very groups. A group that left Redis exists nowhere else, so
a file is written under another name, synced and renamed, and carries the run's id and a digest of its groups. Columns
that only the machine reads, `prompt_encoded` and `parts_encoded`, are the codec's; the rest are plain.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rl import codec
from rl.recorder import RunDirectory, rollout_rows, write_atomically
from rl.trajectory import Completion, Group, Prompt, RewardPart, Trajectory, VersionSpan

if TYPE_CHECKING:
    import pyarrow

SCHEMA = "1"  # of the columns; a column added beside these keeps it
IDENTITY = (b"slipstream_schema", b"slipstream_run_id", b"slipstream_step")
DIGEST, ROWS = b"slipstream_digest", b"slipstream_rows"


class Archive:
    """The archive of one run. Reading and writing are synchronous, and safe in a thread: nothing is shared."""

    def __init__(self, directory: RunDirectory) -> None:
        self.folder = directory.archive
        self._run_id = directory.run_id

    def path_of(self, step: int) -> pathlib.Path:
        """Where a step's groups lie."""
        return self.folder / f"step_{step:06d}.parquet"

    def steps(self) -> list[int]:
        """The archived steps, in order."""
        names = (path.stem.removeprefix("step_") for path in self.folder.glob("step_*.parquet"))
        return sorted(int(name) for name in names if name.isdigit())

    def holds(self, step: int) -> bool:
        """Whether a file of this step is there; only `read` tells whether it is whole."""
        return self.path_of(step).exists()

    def write(self, step: int, groups: Sequence[Group]) -> None:
        """Keep a step's groups, in the order of its batch. The same groups give the same bytes, if written again.

        Raises:
            OSError: the file could not be written; one written earlier is unharmed.
        """
        import pyarrow
        import pyarrow.parquet

        rows = [row for at, group in enumerate(groups) for row in archive_rows(step, group, at)]
        facts = dict(zip(IDENTITY, self._identity(step), strict=True))
        facts |= {DIGEST: _digest(groups).encode(), ROWS: str(len(rows)).encode()}
        table = pyarrow.Table.from_pylist(rows, schema=_schema().with_metadata(facts))
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(table, sink, compression="zstd", write_page_checksum=True)
        write_atomically(self.path_of(step), sink.getvalue().to_pybytes())

    def read(self, step: int) -> list[Group]:
        """The groups that step `step` trained on, in the order of its batch, equal to those that were written.

        Raises:
            ValueError: the file is missing, cut off, damaged or of something else; it is left as it is.
        """
        table = self._table(step, None)
        facts = table.schema.metadata
        try:
            rows: list[dict[str, Any]] = table.to_pylist()
            groups = [_group(list(answers)) for _, answers in groupby(rows, key=lambda row: row["position"])]
        except (ValueError, TypeError) as error:  # a TypeError is an empty cell where none can be
            raise self._damaged(step, str(error)) from error
        if str(len(rows)).encode() != facts.get(ROWS) or _digest(groups).encode() != facts.get(DIGEST):
            raise self._damaged(step, f"its {len(rows)} rows are not those that were written")
        return groups

    def columns(self, step: int, *names: str) -> list[dict[str, Any]]:
        """One row per answer with these columns alone, to search many steps; unlike `read`, without the whole digest.

        Raises:
            ValueError: as `read` does.
        """
        return self._table(step, list(names)).to_pylist()

    def _identity(self, step: int) -> tuple[bytes, bytes, bytes]:
        return SCHEMA.encode(), self._run_id.encode(), str(step).encode()

    def _table(self, step: int, names: list[str] | None) -> pyarrow.Table:
        import pyarrow
        import pyarrow.parquet

        path = self.path_of(step)
        if not self.holds(step):
            archived = self.steps()
            held = f"archived are steps {archived[0]} to {archived[-1]}" if archived else "no step is archived yet"
            raise ValueError(f"{path} does not exist: step {step} was not archived; {held}")
        try:
            with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
                found = file.schema_arrow
                facts = found.metadata or {}
                self._check_identity(step, tuple(facts.get(name, b"").decode() for name in IDENTITY))
                changed = [known.name for known in _schema() if found.field(known.name).type != known.type]
                if changed:
                    raise self._damaged(step, f"the type of column {changed[0]} is not the one that was written")
                return file.read(columns=names)
        except (pyarrow.ArrowException, OSError, KeyError, UnicodeError) as error:
            raise self._damaged(step, " ".join(str(error).split())[:300]) from error

    def _check_identity(self, step: int, found: tuple[str, ...]) -> None:
        expected = tuple(value.decode() for value in self._identity(step))
        if found == expected:
            return
        if not found[0]:
            told = "was not written by this project's archive"
        elif found[0] != expected[0]:
            told = f"has the columns of schema {found[0]}, this version reads {SCHEMA}; use the version that wrote it"
        else:
            told = f"holds step {found[2]} of run {found[1]}, not step {step} of run {self._run_id}"
        raise ValueError(f"{self.path_of(step)} {told}; put the file of this run back, other steps are unharmed")

    def _damaged(self, step: int, what: str) -> ValueError:
        return ValueError(
            f"{self.path_of(step)} is damaged: {what}. Other steps are unharmed, and training goes on without it: "
            "only replay, lineage and a rollback to before this step need it. Restore it from a copy, or move it away"
        )


def archive_rows(step: int, group: Group, position: int = 0) -> Iterator[dict[str, Any]]:
    """One complete row per answer of a group."""
    prompt = codec.encode(group.prompt)
    for index, (row, trajectory) in enumerate(zip(rollout_rows(group), group.trajectories, strict=True)):
        yield row | {
            "step": step,
            "position": position,
            "draw": group.draw,
            "finished_at": group.finished_at,
            "parts": json.dumps(row["parts"]),
            "failures": json.dumps(row["failures"]),
            "reward_versions": json.dumps({part.name: part.reward_version for part in trajectory.parts}),
            "prompt_token_ids": group.prompt.token_ids,
            "token_ids": trajectory.completion.token_ids,
            "logprobs": trajectory.completion.logprobs,
            "prompt_encoded": prompt if index == 0 else None,
            "parts_encoded": codec.encode(trajectory.parts),
        }


def _group(rows: Sequence[dict[str, Any]]) -> Group:
    """The inverse of archive_rows. Raises ValueError where a row is not what archive_rows writes."""
    first = rows[0]
    return Group(
        group_id=first["group"],
        draw=first["draw"],
        prompt=codec.decode(first["prompt_encoded"] or b"", Prompt),
        trajectories=tuple(_trajectory(row) for row in rows),
        finished_at=first["finished_at"],
    )


def _trajectory(row: dict[str, Any]) -> Trajectory:
    return Trajectory(
        completion=Completion(
            text=row["completion"],
            token_ids=tuple(row["token_ids"]),
            logprobs=tuple(row["logprobs"]),
            spans=tuple(VersionSpan(*span) for span in row["versions"]),
            finish_reason=row["finish_reason"],
        ),
        reward=row["reward"],
        parts=codec.decode(row["parts_encoded"] or b"", tuple[RewardPart, ...]),
    )


def _digest(groups: Iterable[Group]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for group in groups:
        digest.update(codec.encode_group(group))
    return digest.hexdigest()


def _schema() -> pyarrow.Schema:
    """Named rather than inferred: a step without any reward has the columns of every other."""
    import pyarrow as pa

    text, whole, number, encoded = pa.string(), pa.int64(), pa.float64(), pa.binary()
    return pa.schema(
        {
            "step": whole,
            "position": whole,
            "group": text,
            "draw": whole,
            "prompt_id": text,
            "source": text,
            "level": text,
            "prompt": text,
            "reference": text,
            "completion": text,
            "reward": number,
            "parts": text,
            "failures": text,
            "reward_versions": text,
            "finish_reason": text,
            "tokens": whole,
            "versions": pa.list_(pa.list_(whole)),
            "mean_logprob": number,
            "finished_at": number,
            "prompt_token_ids": pa.list_(whole),
            "token_ids": pa.list_(whole),
            "logprobs": pa.list_(number),
            "prompt_encoded": encoded,
            "parts_encoded": encoded,
        }
    )
