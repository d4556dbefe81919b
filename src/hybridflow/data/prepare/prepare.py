"""Writes a known data set as train.parquet and test.parquet."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hybridflow.data.files import ENDINGS, ending, read_file
from hybridflow.data.hub import is_hub_name, read_hub
from hybridflow.data.prepare.schema import Generated, Published, Split
from hybridflow.data.prepare.sets import SETS
from hybridflow.data.rows import Row
from hybridflow.errors import UserError, nearest


def prepare(name: str, source: str | None, out: Path, *, rows: int | None = None, seed: int = 0) -> Iterator[str]:
    """Writes the splits that the data set has; reports the number of rows of each file, and its first row.

    Args:
        name: a key of `SETS`.
        source: a folder with the set's files, or another name on the hub than the set's own; None: its own.
        out: folder to write.
        rows: at most this many of each split; of a published set they are chosen at random.
        seed: for that choice, and for sets that are made here.

    Raises:
        UserError: no such set, its source cannot be read, or has other columns than the set.
    """
    if name not in SETS:
        raise UserError(f"there is no data set {name!r} to prepare", fix=nearest(name, SETS))
    if rows is not None and rows < 1:
        raise UserError(f"--rows is {rows}, it must be at least 1")
    known = SETS[name]
    if isinstance(known, Generated):
        if source is not None:
            raise UserError(f"{name} is made here, it has no source", fix="leave --from out")
        made = {split: known.make(split, min(n, rows or n), seed) for split, n in known.counts.items()}
    else:
        made = _converted(name, known, source, rows, seed)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {out} cannot be made: {error.strerror}", fix="give another --out") from error
    for split, found in made.items():
        pq.write_table(pa.Table.from_pylist(found), out / f"{split}.parquet")
        yield f"wrote {out / f'{split}.parquet'}: {len(found)} rows"
        yield f"  first row: {_shown(found[0])}"


def _converted(name: str, known: Published, source: str | None, rows: int | None, seed: int) -> dict[Split, list[Row]]:
    made, place = {}, source or known.hub
    for split, published in known.splits.items():
        found = _read(name, known, source, published)
        if not found:
            continue
        lacking = [c for c in known.columns if c not in found[0]]
        if lacking:
            raise UserError(
                f"the {published} split of {place} has no column {lacking[0]!r}",
                why=f"prepare {name} expects {', '.join(known.columns)}; there is {', '.join(found[0])}",
                fix="check that this is the data set, in the form in which it was published",
            )
        chosen: list[int] | range = range(len(found))
        if rows is not None and rows < len(found):
            chosen = sorted(random.Random(f"{name}-{split}-{seed}").sample(range(len(found)), rows))
        made[split] = list(_convert(known, split, found, chosen, name=f"the {published} split of {place}"))
        if not made[split]:
            raise UserError(f"no row of the {published} split of {place} can be used")
    if not made:
        wanted = " or ".join(f"{split}.jsonl" for split in known.splits.values())
        raise UserError(
            f"no files of {name} in {source}",
            why="a file belongs to a split by its name, as test.jsonl or train-00000-of-00002.parquet do",
            fix=f"name it {wanted} (.json and .parquet will do too)",
        )
    return made


def _convert(known: Published, split: Split, rows: Sequence[Row], chosen: Iterable[int], *, name: str) -> Iterator[Row]:
    for i in chosen:
        try:
            made = known.convert(rows[i], split, i)
        except UserError as error:
            raise UserError(f"row {i} of {name}: {error.what}", fix="check that this is the data set") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:  # a row unlike the published ones
            raise UserError(
                f"row {i} of {name} is not as published: {type(error).__name__}: {error}",
                why=f"it is {_shown(rows[i])}",
            ) from error
        if made is not None:
            yield made


def _read(name: str, known: Published, source: str | None, split: str) -> list[Row]:
    """Reads the rows of a split; none if a folder has no file of it."""
    instead = f"give the folder of its files: hybridflow prepare {name} --from FOLDER"
    if source is None or is_hub_name(source):
        if source is not None and "/" in source.partition(":")[2]:
            raise UserError(f"{source} names one split", fix="give org/name or org/name:config; all splits are read")
        return read_hub(source or known.hub, split=split, instead=instead)
    folder = Path(source)
    if not folder.is_dir():
        raise UserError(f"no folder {source}", fix="--from takes a folder with the set's files, or org/name on the hub")
    for place in (folder, folder / "data"):  # the second as in a copy of the set's repository
        files = [p for p in sorted(place.glob("*")) if ending(p) in ENDINGS and _split_of(p) == split]
        if files:
            return [row for file in files for row in read_file(file)]
    return []


def _split_of(path: Path) -> str:
    """Returns the split that a file's name begins with.

    >>> [_split_of(Path(p)) for p in ("test.jsonl", "train-00000-of-00002.parquet", "val_1.json", "notes.json")]
    ['test', 'train', 'validation', 'notes']
    """
    first = path.stem.replace("_", "-").partition("-")[0]
    return {"val": "validation", "valid": "validation", "dev": "validation"}.get(first, first)


def _shown(row: Row) -> str:
    shown = json.dumps(row, default=lambda value: f"<{len(value)} bytes>" if isinstance(value, bytes) else str(value))
    return shown if len(shown) <= 600 else shown[:600] + " ..."
