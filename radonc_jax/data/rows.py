"""Streams of table rows as text: what `predict` reads, whole files never being in memory.

Unlike `extract`, which reads a clinic's export under the project's own column names, this changes
nothing: the columns are the file's, and every value is its text. Rows count as there: the header
is row 1, in jsonl a row is a line.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

KINDS = (".csv", ".xlsx", ".parquet", ".jsonl")
Row = tuple[int, list[str]]  # number, values


@dataclass(frozen=True)
class Rows:
    """A table file that has been read through once and can be read again by iteration.

    Attributes:
      path: of the file.
      columns: its header.
      count: rows below the header.
    """

    path: Path
    columns: list[str]
    count: int

    def __iter__(self) -> Iterator[Row]:
        rows = _read(self.path)
        next(rows)
        return rows


def open_rows(path: str | Path) -> Rows:
    """Reads a file through and checks it.

    Raises:
      FileNotFoundError: no such file.
      ValueError: another kind of file, damaged, not UTF-8, no rows, a column twice, or a row of
        another length than the header; places are named, never what stands there.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix.lower() not in KINDS:
        raise ValueError(
            f"{path}: {path.suffix or 'a file without an ending'} is not read; "
            f"use one of {', '.join(KINDS)}"
        )
    rows = _read(path)
    _, columns = next(rows, (1, []))
    repeated = sorted({name for name in columns if columns.count(name) > 1})
    if repeated:
        raise ValueError(f"{path}: the header names {', '.join(repeated)} more than once")
    count = 0
    for number, values in rows:
        if len(values) != len(columns):
            raise ValueError(
                f"{path}: row {number} has {len(values)} columns, the header has {len(columns)}"
            )
        count += 1
    if not count:
        raise ValueError(f"{path}: there are no rows below the header")
    return Rows(path, columns, count)


def _read(path: Path) -> Iterator[Row]:
    """The header, then the rows."""
    readers = {".csv": _csv, ".xlsx": _xlsx, ".parquet": _parquet, ".jsonl": _jsonl}
    return readers[path.suffix.lower()](path)


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    number = 0
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            for number, values in enumerate(reader, 1):
                if values:
                    yield number, values
        except csv.Error as error:
            raise ValueError(f"{path}: row {number + 1}: {error}; correct the quotes") from None
        except UnicodeDecodeError:
            raise ValueError(f"{path}: not UTF-8 after row {number}; save it as UTF-8") from None


def _xlsx(path: Path) -> Iterator[Row]:
    import openpyxl

    try:
        workbook = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except Exception as error:  # openpyxl and zipfile raise many kinds for a broken workbook
        raise ValueError(f"{path}: not a readable workbook ({type(error).__name__})") from None
    try:
        width = 0
        for number, values in enumerate(workbook.active.iter_rows(values_only=True), 1):
            texts = [_text(value) for value in values]
            if not any(texts):
                continue  # sheets often end in rows that were emptied
            # Cells that were never filled are not stored, so a row may end early.
            while texts and not texts[-1] and (not width or len(texts) > width):
                texts.pop()
            width = width or len(texts)
            yield number, texts + [""] * (width - len(texts))
    finally:
        workbook.close()


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            yield 1, names
            number = 1
            for batch in file.iter_batches(batch_size=1024):
                for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                    number += 1
                    yield number, [_text(value) for value in values]
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise ValueError(f"{path}: not a readable Parquet file ({type(error).__name__})") from None


def _jsonl(path: Path) -> Iterator[Row]:
    # Lines may have different keys: the columns are all of them, in order of appearance.
    columns: dict[str, None] = {}
    for _, record in _json_lines(path):
        columns |= dict.fromkeys(record)
    yield 0, list(columns)
    for number, record in _json_lines(path):
        yield number, [_text(record.get(name)) for name in columns]


def _json_lines(path: Path) -> Iterator[tuple[int, dict]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:  # its message would quote the line; UnicodeDecodeError is one
                raise ValueError(f"{path}: line {number} is not JSON") from None
            if not isinstance(record, dict):
                raise ValueError(f"{path}: line {number} is not an object of column: value")
            yield number, record


def _text(value) -> str:
    if value is None:
        return ""
    if isinstance(value, (list, dict)):
        return json.dumps(value, ensure_ascii=False)
    return str(value)
