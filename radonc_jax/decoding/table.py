"""Answers beside the rows of a table of any length, written so that a kill loses nothing."""

import csv
import dataclasses
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from radonc_jax import parallel, tracking
from radonc_jax.data.rows import Damaged, Rows
from radonc_jax.decoding.journal import Journal
from radonc_jax.decoding.text import TextDecoder
from radonc_jax.tasks import icd
from radonc_jax.tasks.base import Task

ADDED = (
    "answer",
    "parsed",
    "logprob",
    "finished",
    "trimmed",
    "problem",
    "gap",
    "beyond_training",
)
NOT_FINITE = "log-probability not finite"
CHUNK = 2048  # rows in memory at a time; within them, prompts of like length go together
REPORT_SECONDS = 30  # between lines of progress where there is no terminal
FORMAT = 4  # of the files beside an unfinished output; those of another one are not gone on with
TOLD = 20  # numbers of rows without an answer that are told for each reason


def added_columns(task: Task, scored: bool) -> tuple[str, ...]:
    """The columns beside those of a table; with `scored`, one for each label of the task too."""
    labels = task.labels if scored and task.labels else ()
    return (*ADDED, *(f"logprob_{label}" for label in labels))


class _Progress(tqdm):
    """Rows done: a bar in terminals; elsewhere, where `lines`, a line now and then."""

    def __init__(self, *, lines: bool, initial: int, **options):
        super().__init__(initial=initial, **options)
        self._lines = lines and self.disable
        self._done = initial  # a bar that is off does not count
        self._first = self._begun = self._told = None

    def update(self, n=1):
        self._done += n
        now = time.monotonic()
        if self._begun is None:  # what was kept, and skipping it, is no measure of the pace
            self._first, self._begun, self._told = self._done, now, now
        elif self._lines and now - self._told >= REPORT_SECONDS and self._done > self._first:
            self._told, rate = now, (self._done - self._first) / (now - self._begun)
            left = (self.total - self._done) / rate
            print(
                f"{self._done} of {self.total} rows, {rate:.1f} rows/s, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
        return super().update(n)


class Told(NamedTuple):
    """What is told of a table that was answered.

    Attributes:
      problems: by reason of having no answer: {"rows": how many rows, "first": the first of their
        numbers}; not all of them, so that a million cost no memory.
      trimmed: rows that were answered with their diagnosis cut.
      unknown: rows with an ICD-10-CM code that the code table does not know.
    """

    problems: dict[str, dict]
    trimmed: int
    unknown: int


class Part:
    """The output while it is being written: beside it, under another name, to be gone on with.

    Args:
      output: the file to be.
      source: all that it depends on; what is left of another source is thrown away.

    Attributes:
      rows: that are written already.
      problems, trimmed, unknown: of those, as `Told` has them.
      other: what is another in the source of that which was thrown away; empty where nothing was.
      left: rows of it.
    """

    def __init__(self, output: Path, source: Mapping):
        self.output = output
        self._path = output.with_name(f".{output.name}.part")
        self._place = output.with_name(f".{output.name}.place.json")
        self._source = {"format": FORMAT} | dict(source)
        self._main = parallel.is_main_process()
        self.rows, self.problems, self.trimmed, self.unknown = 0, {}, 0, 0
        self.other: list[str] = []
        self.left = 0
        self._file = None
        self.rows, self.other = parallel.on_main(self._open)

    def _open(self) -> list:
        """Goes on where it can; (rows, other), as attributes."""
        rows, size = 0, 0
        if self._path.is_file() and self._place.is_file():
            place = json.loads(self._place.read_text(encoding="utf-8"))
            then = place["source"]
            names = sorted(then.keys() | self._source.keys())
            self.other = [name for name in names if then.get(name) != self._source.get(name)]
            self.left = place["rows"] if self.other else 0
            # Without a row there is nothing to go on with: the header is written anew.
            if place["rows"] and not self.other:
                rows, size = place["rows"], place["bytes"]
                self.problems = place["problems"]
                self.trimmed, self.unknown = place["trimmed"], place["unknown"]
        self._file = open(self._path, "a", encoding="utf-8", newline="")  # noqa: SIM115
        self._file.truncate(size)
        self.writer = csv.writer(self._file)
        return [rows, self.other]

    @property
    def told(self) -> Told:
        return Told(self.problems, self.trimmed, self.unknown)

    def unanswered(self, number: int, problem: str) -> None:
        """Counts a row without an answer."""
        entry = self.problems.setdefault(problem, {"rows": 0, "first": []})
        entry["rows"] += 1
        if len(entry["first"]) < TOLD:
            entry["first"].append(number)

    def write(self, lines, read: int) -> None:
        """Appends lines; from here on the first `read` rows survive the process."""
        self.rows = read
        if self._main:
            self.writer.writerows(lines)
            self._file.flush()
            place = {"source": self._source, "rows": read, "bytes": self._path.stat().st_size}
            tracking.write_json(self._place, place | self.told._asdict())

    def finish(self) -> None:
        """A file of the output's name is whole."""
        if self._main:
            self._file.close()
            os.replace(self._path, self.output)
            self._place.unlink()


def answer_rows(
    rows: Rows, column: str, task: Task, decoder: TextDecoder, output: Path, source: Mapping
) -> Told:
    """Writes each row with its answer; returns what is to be told of them.

    Rows come out as they came in: one that is too short is filled up, and what one has too much
    stands, with its delimiters, in its last column.

    Every process of a run decodes, one of them writes. The output is whole or absent; killed and
    called again with the same `source`, it goes on where it was, and tells so.

    Args:
      rows: the table.
      column: its column with the diagnosis text.
      task: what is asked.
      decoder: answers; its journal and progress bar are set here.
      output: the .csv file to be: the table's columns and `added_columns`.
      source: all that the answers depend on, for JSON.

    Raises:
      ValueError: no answer of a whole chunk of several has a log-probability that is finite.
    """
    part = Part(output, source)
    place, width = rows.columns.index(column), len(rows.columns)
    constraint = decoder.constraints.get(task.name)
    labels = constraint.labels if constraint else ()
    columns = added_columns(task, bool(labels))
    journal = Journal(output.with_name(f".{output.name}.answers"), source)
    main = parallel.is_main_process()
    if main and (part.rows or journal.count or part.left):
        told = (
            f"{part.rows} rows of an interrupted run are taken over, and up to {journal.count} "
            "answers more"
        )
        if part.other:
            told = f"what a run with another {', '.join(part.other)} has left is thrown away"
        print(f"{output}: {told}", file=sys.stderr, flush=True)
    if part.other:
        journal.clear()  # before the place file is of this source
    if not part.rows:
        part.write([[*rows.columns, *columns]], 0)
    with _Progress(
        lines=main,
        total=rows.count,
        initial=part.rows,
        desc=task.name,
        unit="row",
        disable=None if main else True,  # None: shown in terminals only
    ) as bar:
        decode = dataclasses.replace(decoder, progress=bar, journal=journal)
        stream = itertools.islice(rows, part.rows, None)
        while chunk := list(itertools.islice(stream, CHUNK)):
            added: dict[int, dict] = {}
            asked, prompts = [], []
            for number, values in chunk:
                problem = ""
                if isinstance(values, Damaged):
                    problem = values.problem
                elif len(values) != width:
                    problem = f"not of {width} columns, as the header is"
                elif not values[place].strip():
                    problem = "empty diagnosis"
                else:
                    prompt = decode.prompt(task, values[place])
                    if prompt.fits:
                        asked.append(number)
                        prompts.append(prompt)
                    else:
                        problem = f"prompt longer than {decode.scheduler.room} tokens"
                if problem:
                    part.unanswered(number, problem)
                    added[number] = {"problem": problem}
                    bar.update()
            answers = decode.answer(task, prompts)
            broken = [not math.isfinite(answer.logprob) for answer in answers]
            if len(answers) > 1 and all(broken):
                raise ValueError(
                    f"rows {asked[0]} to {asked[-1]}: no answer has a log-probability that "
                    "is finite; weights or precision are broken, so the answers mean nothing"
                )
            for number, prompt, answer, bad in zip(asked, prompts, answers, broken, strict=True):
                if bad:
                    part.unanswered(number, NOT_FINITE)
                    added[number] = {"problem": NOT_FINITE}
                    continue
                parsed = task.parse(answer.text)
                part.trimmed += answer.trimmed
                part.unknown += task.name == "icd" and bool(parsed) and not icd.in_table(parsed)
                added[number] = {
                    "answer": answer.text,
                    "parsed": parsed,
                    "logprob": answer.logprob,
                    "finished": answer.finished,
                    "trimmed": answer.trimmed,
                    "gap": answer.gap,
                    "beyond_training": prompt.beyond,
                } | {f"logprob_{label}": answer.label_logprobs[label] for label in labels}
            part.write(
                (
                    _fitted(values, width, rows.layout.delimiter or ",")
                    + [added[number].get(name, "") for name in columns]
                    for number, values in chunk
                ),
                part.rows + len(chunk),
            )
            journal.clear()  # they are in the file now
    part.finish()
    journal.remove()
    return part.told


def _fitted(values: list[str], width: int, delimiter: str) -> list[str]:
    """A row's cells, as many as the header has, and nothing of them lost."""
    if len(values) > width:
        return [*values[: width - 1], delimiter.join(values[width - 1 :])]
    return [*values, *[""] * (width - len(values))]
