"""Streams of table rows as text, whole files never in memory: for `prepare` and `predict`.

Nothing is changed: the columns are the file's, and every value is its text. Rows count as in a
spreadsheet: the header is row 1, in jsonl, which has none, a row is a line.
"""

import codecs
import csv
import errno
import io
import itertools
import json
import re
import tempfile
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, datetime, time
from pathlib import Path

KINDS = (".csv", ".xlsx", ".parquet", ".jsonl", ".tsv")
DELIMITERS = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|"}
Row = tuple[int, list[str]]  # number, values
MOST_EMPTY = 1000

_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins with the mark of UTF-16, so it stands before it
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# What stands in western text beside letters. Windows-1252 decodes nearly any bytes: only these make
# it a likely reading.
_LIKELY_MARKS = frozenset("€‚„…‰‹›‘’“”•–—™¡£§©ª«¬®¯°±²³´µ¶·¹º»¼½¾¿×÷\xa0\xad")
_UNLIKELY_LETTERS = frozenset("ÿþðÐÞ")
_BLOCK = 1 << 22  # bytes, or characters
# Bytes that are no text, as "surrogateescape" gives them, and NUL, which no text has.
_NO_TEXT = re.compile("[\\0\udc80-\udcff]")
_NO_CELL = "a cell cannot be read"


class Damaged(list):
    """Cells of a row that cannot be read as it should, as far as they can.

    Attributes:
      problem: what is wrong, without what stands there.
    """

    def __init__(self, values, problem: str):
        super().__init__(values)
        self.problem = problem


class _RowError(ValueError):
    """Told in our own words; what libraries raise may quote the cell."""


@dataclass(frozen=True)
class Layout:
    """How a table file is read.

    Attributes:
      kind: one of KINDS, or "" for a folder of `datasets.save_to_disk`.
      encoding, delimiter: of a csv or tsv, else "".
      sheet: of a workbook, else "".
      guessed: the encoding is a guess; nothing in the file proves it.
      notes: what a reader of the counts should know, places only.
    """

    kind: str
    encoding: str = ""
    delimiter: str = ""
    sheet: str = ""
    guessed: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rows:
    """A table file that has been read through once and can be read again by iteration.

    Attributes:
      path: of the file.
      columns: its header.
      count: rows below the header.
      layout: how it is read.
      ragged: as `read_rows`.
    """

    path: Path
    columns: list[str]
    count: int
    layout: Layout
    ragged: bool = False

    def __iter__(self) -> Iterator[Row]:
        rows = read_rows(self.path, self.layout, ragged=self.ragged)
        next(rows)
        return rows


def open_rows(
    path: str | Path, *, encoding: str = "", sheet: str = "", ragged: bool = False
) -> Rows:
    """Reads a file through and checks it.

    Args:
      path: of the file.
      encoding, sheet: as `find_layout`; found out if not given.
      ragged: as `read_rows`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: another kind of file, damaged, no text, no rows, a column twice, or a row of
        another length than the header; places are named, never what stands there.
    """
    path = Path(path)
    layout = find_layout(path, encoding, sheet=sheet, ragged=ragged)
    rows = read_rows(path, layout, ragged=ragged)
    _, columns = next(rows, (1, []))
    repeated = [str(at) for at, name in enumerate(columns, 1) if columns.count(name) > 1]
    if repeated:  # places alone: row 1 may be a record
        raise ValueError(
            f"{path}: columns {', '.join(repeated)} share names in the header; rename all but one"
        )
    count = sum(1 for _ in rows)
    if not count:
        raise ValueError(f"{path}: there are no rows below the header")
    return Rows(path, columns, count, layout, ragged)


def read_rows(path: Path, layout: Layout, *, ragged: bool = False) -> Iterator[Row]:
    """The header, then the rows; every row as long as the header.

    Args:
      path, layout: of the file.
      ragged: a row of another length is no error but comes as it is, and one that cannot be read
        comes as `Damaged`: of a csv its first line, split at each delimiter, with quotes as they
        stand; bytes that are no text as \\xff; of Parquet or a dataset without the cell that cannot
        be read, unless it is text; of a jsonl no cells. Blank lines, and rows of a workbook without
        any cell, are empty rows where others follow, but not over `MOST_EMPTY` in a row (a stray
        cell far below); otherwise they are none.

    Raises:
      ValueError: the file (or its header) is damaged or a row has another length than the header;
        places are named, never what stands there.
    """
    if layout.kind in (".csv", ".tsv"):
        rows = (_ragged if ragged else _delimited)(path, layout)
    elif layout.kind == ".xlsx":
        rows = _xlsx(path, layout.sheet, ragged)
    else:
        rows = {"": _dataset, ".parquet": _parquet, ".jsonl": _jsonl}[layout.kind](path, ragged)
    return _with_empty_rows(rows) if ragged else rows


def _with_empty_rows(rows: Iterator[Row]) -> Iterator[Row]:
    """The readers leave out rows without any cell, but count them."""
    last, columns = None, []
    for number, values in rows:
        if last is None:
            columns = values
        else:
            empty = range(last + 1, number)
            for at in empty if len(empty) <= MOST_EMPTY else ():
                yield at, [""] * len(columns)
        yield number, values
        last = number


# ---------------------------------------------------------------------------------------------
# Finding out how a file is read
# ---------------------------------------------------------------------------------------------


def find_layout(
    path: str | Path,
    encoding: str = "",
    delimiter: str = "",
    sheet: str = "",
    *,
    ragged: bool = False,
) -> Layout:
    """What kind of table `path` is, and how it is read where that is not given.

    A csv or tsv is UTF-8, or what its byte order mark says, or Windows-1252 where that makes text
    of it (`guessed`); with `ragged`, UTF-8 too where a few bytes are none. The delimiter is the one
    of DELIMITERS that makes columns of the first rows.

    Raises:
      FileNotFoundError: no such file or folder.
      ValueError: another kind of file, an option that does not go with it, bytes that are no text,
        or a workbook in which several sheets hold cells and none is chosen.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; give the extract with --input")
    kind = "" if path.is_dir() else path.suffix.lower()
    if path.is_dir():
        if not (path / "state.json").is_file():
            raise ValueError(_no_dataset(path))
    elif kind not in KINDS:
        raise ValueError(
            f"{path}: {path.suffix or 'a file without an ending'} is not read; "
            f"use one of {', '.join(KINDS)}, or a folder of datasets.save_to_disk"
        )
    text = kind in (".csv", ".tsv")
    for option, value, fits in (
        ("encoding", encoding, text),
        ("delimiter", delimiter, text),
        ("sheet", sheet, kind == ".xlsx"),
    ):
        if value and not fits:
            raise ValueError(f"{path}: --{option} does not go with {kind or 'a folder'}; remove it")
    if kind == ".xlsx":
        return Layout(kind, sheet=_find_sheet(path, sheet))
    if not text:
        return Layout(kind)
    guessed, notes = False, []
    if encoding:
        _check_encoding(encoding)
    else:
        encoding, guessed, notes = _find_encoding(path, ragged)
    default = "," if kind == ".csv" else "\t"
    if delimiter:
        delimiter = DELIMITERS.get(delimiter.casefold(), delimiter).replace("\\t", "\t")
        if len(delimiter) != 1 or delimiter in '"\r\n ' or not delimiter.isascii():
            raise ValueError(
                f"--delimiter must be {', '.join(DELIMITERS)} or one character, not {delimiter!r}"
            )
    else:
        delimiter = _find_delimiter(path, encoding, default)
    return Layout(kind, encoding, delimiter, "", guessed, tuple(notes))


def _no_dataset(path: Path) -> str:
    if not (path / "dataset_dict.json").is_file():
        return f"{path}: a folder, but none of datasets.save_to_disk (no state.json in it)"
    splits = ", ".join(sorted(child.name for child in path.iterdir() if child.is_dir()))
    return f"{path}: holds several tables ({splits}); give the folder of one of them"


def _check_encoding(encoding: str) -> None:
    try:
        known = codecs.lookup(encoding)._is_text_encoding
    except (LookupError, ValueError):
        known = False
    if not known:
        raise ValueError(
            f"--encoding={encoding!r} is not known; use utf-8, utf-16, cp1252, latin-1 ..."
        )


def _find_encoding(path: Path, ragged: bool) -> tuple[str, bool, list[str]]:
    """(encoding, whether it is a guess, notes)."""
    notes: list[str] = []
    with path.open("rb") as file:
        head = file.read(4096)
        for mark, encoding in _BYTE_ORDER_MARKS:
            if head.startswith(mark) and encoding != "utf-8-sig":
                return encoding, False, notes
        if b"\0" in head:
            for start, encoding in ((1, "utf-16-le"), (0, "utf-16-be")):
                zeros = head[start::2].count(0)
                if zeros > 0.4 * len(head) and head[1 - start :: 2].count(0) == 0:
                    return encoding, True, notes
        file.seek(0)
        line, damaged, wrong = 1, 0, None
        while block := b"".join(file.readlines(_BLOCK)):
            # A block ends with a line, and so never inside a character.
            if not ragged and (place := block.find(b"\0")) >= 0:
                at = line + block.count(b"\n", 0, place)
                raise ValueError(
                    f"{path}: line {at} holds a NUL byte; the file is damaged, or give --encoding"
                )
            damaged += block.count("\N{REPLACEMENT CHARACTER}".encode())
            try:
                block.decode("utf-8")
            except UnicodeDecodeError as error:
                at = line + block.count(b"\n", 0, error.start)
                wrong = (at, error.start - block.rfind(b"\n", 0, error.start))
                break
            line += block.count(b"\n")
            last = block
    if wrong is None:
        if damaged:
            notes.append(
                f"{damaged} characters were lost before this export ({path.name} holds "
                "replacement characters); export again if you can"
            )
        if line > 1 and not last.endswith((b"\n", b"\r")):
            notes.append(f"{path.name} does not end in a line break: was it cut short?")
        return "utf-8-sig", False, notes
    if _reads_as_windows_1252(path):
        notes.append(
            f"{path.name} is not UTF-8 (line {wrong[0]}); read as Windows-1252. If letters are "
            "wrong, give --encoding"
        )
        return "cp1252", True, notes
    if ragged:
        return "utf-8-sig", False, notes
    raise ValueError(
        f"{path}: line {wrong[0]}, byte {wrong[1]} is not UTF-8; save the file as UTF-8, or give "
        "--encoding"
    )


def _reads_as_windows_1252(path: Path) -> bool:
    with path.open("rb") as file:
        for line in file:
            if line.isascii():
                continue
            try:
                line.decode("utf-8")
                return False  # UTF-8 elsewhere: this file is damaged, not in another encoding
            except UnicodeDecodeError:
                pass
            try:
                signs = {sign for sign in line.decode("cp1252") if not sign.isascii()}
            except UnicodeDecodeError:
                return False
            if not all(
                sign in _LIKELY_MARKS or (sign.isalpha() and sign not in _UNLIKELY_LETTERS)
                for sign in signs
            ):
                return False
    return True


def _find_delimiter(path: Path, encoding: str, default: str) -> str:
    try:
        with path.open(encoding=encoding, errors="replace", newline="") as file:
            sample = file.read(1 << 18)
    except UnicodeError:
        return default  # the reader names the place
    best, best_score = default, (False, 1)
    for delimiter in dict.fromkeys((default, *DELIMITERS.values())):
        widths = []
        try:
            for fields in csv.reader(io.StringIO(sample, newline=""), delimiter=delimiter):
                if fields:
                    widths.append(len(fields))
                if len(widths) == 50:
                    break
        except csv.Error:
            pass
        if not widths:
            continue
        alike = sum(width == widths[0] for width in widths) >= 0.5 * len(widths)
        score = (alike and widths[0] > 1, widths[0])
        if score > best_score:
            best, best_score = delimiter, score
    return best


def _find_sheet(path: Path, wanted: str) -> str:
    workbook = _workbook(path)
    try:
        names = list(workbook.sheets)
        if wanted:
            if wanted not in names:
                raise _RowError(f"{path}: no sheet {wanted!r}; there are {', '.join(names)}")
            return wanted
        filled = []
        for name, sheet in workbook.sheets.items():
            cells = (value for _, row in sheet.numbered_rows() for value in row)
            if any(value is not None for value in cells):
                filled.append(name)
    except _RowError:
        raise
    except Exception as error:
        raise _no_workbook(path, error) from None
    finally:
        workbook.close()
    if len(filled) > 1:
        raise ValueError(
            f"{path}: several sheets hold cells ({', '.join(filled)}); choose one with --sheet"
        )
    return filled[0] if filled else names[0]


# ---------------------------------------------------------------------------------------------
# Readers
# ---------------------------------------------------------------------------------------------


def _delimited(path: Path, layout: Layout) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    number, width = 0, 0
    with path.open(encoding=layout.encoding, newline="") as file:
        # csv rather than pandas.read_csv, which fills short rows up without a word.
        reader = csv.reader(file, delimiter=layout.delimiter, strict=True)
        try:
            for number, values in enumerate(reader, 1):
                if not values:
                    continue  # a blank line is no record
                width = width or len(values)
                if len(values) != width:
                    raise ValueError(
                        f"{path}: row {number} (line {reader.line_num}) has {len(values)} columns, "
                        f"the header has {width}; look for a stray delimiter or quote there"
                    )
                yield number, values
        except csv.Error as error:
            raise ValueError(
                f"{path}: row {number + 1} (line {reader.line_num}): {error}; correct the quotes "
                "there"
            ) from None
        except UnicodeError:
            raise ValueError(
                f"{path}: not {layout.encoding} after row {number}; save it as UTF-8, or give "
                "another --encoding"
            ) from None


def _ragged(path: Path, layout: Layout) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    waiting: deque[str] = deque()  # lines that were read beyond a damaged one

    def next_line(file) -> str:
        def take() -> str:
            return waiting.popleft() if waiting else file.readline()

        line = take()
        if line.endswith("\r") and (following := take()):
            if following == "\r\n":  # programs that write "\n" as "\r\n" make this of "\r\n"
                return line + following
            waiting.appendleft(following)
        return line

    def record(file) -> list[str] | None:
        taken = []

        def lines():
            size = 0
            # A quote that nothing closes would swallow the rest of the file.
            while size < _BLOCK and (line := next_line(file)):
                size += len(line)
                taken.append(line)
                yield line

        try:
            values = next(csv.reader(lines(), delimiter=layout.delimiter, strict=True), None)
        except csv.Error:
            waiting.extendleft(reversed(taken[1:]))
            split = csv.reader(taken[:1], delimiter=layout.delimiter, quoting=csv.QUOTE_NONE)
            values = Damaged(next(split), "its quotes do not match")
        if not any(map(_NO_TEXT.search, values or ())):
            return values
        shown = [_NO_TEXT.sub(lambda m: f"\\x{ord(m[0]) & 0xFF:02x}", cell) for cell in values]
        return Damaged(shown, f"bytes that are no text in {layout.encoding.removesuffix('-sig')}")

    with path.open(encoding=layout.encoding, errors="surrogateescape", newline="") as file:
        try:
            for number in itertools.count(1):
                values = record(file)
                if values is None:
                    return
                if number == 1 and isinstance(values, Damaged):
                    raise _RowError(f"{path}: the header cannot be read: {values.problem}")
                if values:  # a blank line is no record
                    yield number, values
        except UnicodeError:
            raise ValueError(
                f"{path}: not {layout.encoding} after row {number - 1}; save it as UTF-8"
            ) from None


def _no_workbook(path: Path, error: Exception) -> ValueError:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ValueError(
            f"{path}: no room for its texts in {tempfile.gettempdir()}, where they lie while it is "
            "read: make room there, or let the variable TMPDIR name another folder"
        )
    return ValueError(f"{path}: not a readable workbook ({type(error).__name__})")


def _workbook(path: Path):
    from radonc_jax.data.workbook import Workbook

    try:
        return Workbook(path)
    except Exception as error:  # openpyxl and zipfile raise many kinds for a broken workbook
        raise _no_workbook(path, error) from None


def _xlsx(path: Path, name: str, ragged: bool) -> Iterator[Row]:
    workbook = _workbook(path)
    try:
        width = 0
        for number, values in workbook.sheets[name].numbered_rows():
            texts = [_text(value) for value in values]
            if not any(texts):
                continue  # sheets often end in rows that were emptied
            # Cells that were never filled are not stored, so a row may end early.
            while texts and not texts[-1] and (not width or len(texts) > width):
                texts.pop()
            width = width or len(texts)
            if len(texts) > width and not ragged:
                raise _RowError(
                    f"{path}: row {number} has {len(texts)} columns, the header has {width}; name "
                    "every column in row 1"
                )
            yield number, texts + [""] * (width - len(texts))
    except _RowError:
        raise
    except Exception as error:  # a damaged sheet shows only when it is read
        raise _no_workbook(path, error) from None
    finally:
        workbook.close()


def _parquet(path: Path, ragged: bool) -> Iterator[Row]:
    from pyarrow import parquet

    try:
        # Otherwise all that is compressed of a row group, or of the file, would be held at once.
        with parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            yield 1, file.schema_arrow.names
            yield from _batches(file.iter_batches(batch_size=1024), ragged)
    except Exception as error:  # OSError, several of Arrow's, and Python's own for single cells
        raise ValueError(f"{path}: not a readable Parquet file ({type(error).__name__})") from None


def _batches(batches, ragged: bool) -> Iterator[Row]:
    """Rows of Arrow tables or record batches, of which the first is row 2."""
    number = 2
    for batch in batches:
        columns, damaged = [], set()
        for column in batch.columns:
            try:
                columns.append(column.to_pylist())
            except Exception:  # Arrow's own, and Python's for what it cannot hold
                if not ragged:
                    raise
                columns.append([])
                for place, cell in enumerate(column):
                    try:
                        value = cell.as_py()
                    except Exception:
                        value = _raw_text(cell)
                        damaged.add(place)
                    columns[-1].append(value)
        for place, values in enumerate(zip(*columns, strict=True)):
            texts = [_text(value) for value in values]
            yield number, Damaged(texts, _NO_CELL) if place in damaged else texts
            number += 1


def _raw_text(cell) -> str:
    """Of an Arrow scalar that Python cannot hold: its bytes where it is text, else nothing."""
    if not hasattr(cell, "as_buffer"):
        return ""
    return cell.as_buffer().to_pybytes().decode("utf-8", "backslashreplace")


def _dataset(path: Path, ragged: bool) -> Iterator[Row]:
    import datasets

    try:
        table = datasets.load_from_disk(str(path))
        names = table.column_names
        classes = {
            index: table.features[name].names
            for index, name in enumerate(names)
            if isinstance(table.features[name], datasets.ClassLabel)
        }
        yield 1, names
        for number, values in _batches(table.with_format("arrow").iter(1024), ragged):
            for index, labels in classes.items():
                if values[index]:
                    values[index] = labels[int(values[index])]
            yield number, values
    except Exception as error:  # json, Arrow and datasets each raise their own
        raise ValueError(f"{path}: not a readable dataset ({type(error).__name__})") from None


def _jsonl(path: Path, ragged: bool) -> Iterator[Row]:
    # Lines may have different keys: the columns are all of them, in order of appearance.
    columns: dict[str, None] = {}
    for _, record in _json_lines(path, ragged):
        columns |= dict.fromkeys(record or ())
    yield 0, list(columns)
    for number, record in _json_lines(path, ragged):
        if record is None:
            yield number, Damaged([], "not a JSON object in UTF-8")
        else:
            yield number, [_text(record.get(name)) for name in columns]


def _json_lines(path: Path, ragged: bool) -> Iterator[tuple[int, dict | None]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                yield number, _json_object(line)
            except ValueError as error:
                if not ragged:
                    raise ValueError(f"{path}: line {number} {error}") from None
                yield number, None


def _json_object(line: bytes) -> dict:
    try:
        record = json.loads(line.decode("utf-8"), object_pairs_hook=_once)
        if b"\\u" in line:  # json itself lets halves of surrogate pairs through
            json.dumps(record, ensure_ascii=False).encode("utf-8")
    except _RowError:
        raise
    except (ValueError, RecursionError):  # the message would quote the line
        raise _RowError("is not JSON in UTF-8") from None
    if not isinstance(record, dict):
        raise _RowError("is not an object of column: value")
    return record


def _once(pairs: list[tuple]) -> dict:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise _RowError("has a column twice")  # json would keep the last and drop the others
    return record


def _text(value) -> str:
    if value is None or value != value:  # NaN and NaT alone differ from themselves
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # whole numbers that a gap in their column turned into floats
    if isinstance(value, (list, dict)):
        return json.dumps(value, ensure_ascii=False, default=str)
    if isinstance(value, datetime):
        return str(value.date() if value.time() == time() and not value.tzinfo else value)
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return str(value)
