"""The `predict` command as a user runs it, and the tables that it reads."""

import csv
import dataclasses
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import openpyxl
import optax
import pandas as pd
import pyarrow
import pytest
from pyarrow import parquet
from test_notebook import write_model, write_peft
from test_workbook import write_workbook

import radonc_jax
from configs import common
from radonc_jax import loading
from radonc_jax.data import rows as tables
from radonc_jax.data.cohort import load_records
from radonc_jax.data.rows import open_rows
from radonc_jax.decoding import table
from radonc_jax.decoding.greedy import Generation
from radonc_jax.decoding.table import answer_rows
from radonc_jax.decoding.text import Prompt
from radonc_jax.models import huggingface, lora
from radonc_jax.tasks import TASKS
from radonc_jax.tasks.icd import is_leaf
from radonc_jax.training.checkpoint import Checkpoints, Progress
from radonc_jax.training.step import TrainState, fingerprint
from tests import reports

ROOT = Path(__file__).parents[1]
SECRET = "Zebra sarcoma of Jane Roe"
CASES = [
    {
        "id": "007",
        "diagnosis": "Carcinoma of the left breast, T1 N0",
        "note": 'said "ok", then\nleft',
    },
    {"id": "8", "diagnosis": "   ", "note": ""},
    {"id": "9", "diagnosis": SECRET, "note": "NA"},
    {"id": "10", "diagnosis": f"{SECRET} " * 30, "note": ""},
    {"id": "11", "diagnosis": "Prostate", "note": "é"},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with `base`, `peft` (an adapter), `run` (the same one, trained) and cases.csv."""
    place = tmp_path_factory.mktemp("predict")
    write_model(place / "base")
    config = huggingface.read_config(place / "base")
    write_peft(
        place / "peft", lambda adapter: lora.partition(config, adapter, jnp.float32), place / "base"
    )
    lm = radonc_jax.load(str(place / "base"), adapter=str(place / "peft"), dtype="float32")
    settings = common.get_config()
    settings.task, settings.model = "icd", str(place / "base")
    settings.precision.compute = settings.precision.base = "float32"
    settings.lora.rank, settings.lora.alpha = 4, 8.0
    settings.lora.targets = ("q_proj", "down_proj")
    settings.decode.batch, settings.decode.max_new_tokens = 4, 6
    (place / "run").mkdir()
    (place / "run" / "config.json").write_text(json.dumps(settings.to_dict()))
    adapter = jax.tree.map(jnp.asarray, lm._loaded.trainable)
    state = TrainState(jnp.int32(3), adapter, optax.adam(0.1).init(adapter))
    saved = Checkpoints(place / "run")
    saved.save(3, state, Progress(best_step=3, best_value=0.5))
    saved.close()
    write_csv(place / "cases.csv", CASES)
    return place


def write_csv(path, records):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, records[0])
        writer.writeheader()
        writer.writerows(records)


def predict(*arguments):
    """(exit code, stdout, stderr) of the command."""
    done = subprocess.run(
        [sys.executable, "-m", "radonc_jax.predict", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_run_folder_answers_each_row_in_order(place, tmp_path):
    output = tmp_path / "deep" / "answers.csv"
    code, out, err = predict(
        f"--workdir={place}/run", f"--input={place}/cases.csv", f"--output={output}"
    )
    assert code == 0, err
    rows = read(output)
    assert [{name: row[name] for name in CASES[0]} for row in rows] == CASES
    # What the notebook says of the same prompts, of which two have none.
    lm = radonc_jax.load(str(place / "base"), adapter=str(place / "run"), dtype="float32")
    answered = [0, 2, 4]
    task = TASKS["icd"]
    prompts = [task.prompt(CASES[number]["diagnosis"]) for number in answered]
    for number, expected in zip(answered, lm.generate(prompts, 6), strict=True):
        row = rows[number]
        # Control characters that a random model emits come back as csv reads them.
        assert row["answer"].split() == expected.text.split()
        assert row["parsed"] == (task.parse(expected.text) or "")
        assert float(row["logprob"]) == pytest.approx(expected.logprob, abs=1e-4)
        assert row["finished"] == str(expected.finished)
        assert row["problem"] == ""
    for number, problem in ((1, "empty diagnosis"), (3, "prompt longer than 506 tokens")):
        row = rows[number]
        assert row["problem"] == problem
        assert [row[name] for name in ("answer", "parsed", "logprob", "finished")] == [""] * 4
    told = (
        "3 of 5 rows answered, 0 with a diagnosis that was cut, 0 with a code that does not exist"
    )
    assert f"{told}: {output}\n" in out
    assert "empty diagnosis: row 3" in err and "506 tokens: row 5" in err
    assert "Zebra" not in out + err and "breast" not in out + err
    assert [path.name for path in output.parent.iterdir()] == ["answers.csv"]


def test_a_run_folder_whose_base_lies_elsewhere(place, tmp_path):
    shutil.copytree(place / "run", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps(config | {"model": "/nowhere/model"}))
    output = tmp_path / "answers.csv"
    flags = [f"--workdir={tmp_path}/run", f"--input={place}/cases.csv", f"--output={output}"]
    code, _, err = predict(*flags)
    assert code == 1 and "'/nowhere/model' is not a folder here" in err and "(--base=/path" in err
    assert not output.exists()
    code, out, err = predict(*flags, f"--base={place}/base")
    assert code == 0, err
    assert "3 of 5 rows answered" in out


def test_model_with_adapter_and_another_column(place, tmp_path):
    records = [{"Dx": case["diagnosis"]} for case in (CASES[0], CASES[4])]
    pd.DataFrame(records).to_parquet(tmp_path / "cases.parquet")
    output = tmp_path / "answers.csv"
    output.write_text("old")
    options = [
        f"--model={place}/base",
        "--dtype=float32",
        "--task=modality",
        f"--input={tmp_path}/cases.parquet",
        f"--output={output}",
        "--column=Dx",
        "--max_new_tokens=5",
        "--batch=2",
        "--overwrite",
    ]
    code, _, err = predict(*options, f"--adapter={place}/peft")
    assert code == 0, err
    rows = read(output)
    assert [row["Dx"] for row in rows] == [record["Dx"] for record in records]
    lm = radonc_jax.load(str(place / "base"), adapter=str(place / "peft"), dtype="float32")
    expected = lm.generate([TASKS["modality"].prompt(record["Dx"]) for record in records], 5)
    for row, generation in zip(rows, expected, strict=True):
        assert row["answer"].split() == generation.text.split()


def test_killed_at_any_moment_it_goes_on_and_the_file_is_the_same(place, tmp_path):
    rng = random.Random(0)
    words = "left right breast prostate lung T1 T2 N0 node".split()
    cases = [{"diagnosis": " ".join(rng.choices(words, k=1 + i % 7))} for i in range(200)]
    write_csv(tmp_path / "cases.csv", cases)

    def start(output, adapter=("--adapter={place}/run",)):
        # Small chunks, so that there are moments to be killed at.
        code = "from radonc_jax import command, predict\nfrom radonc_jax.decoding import table\n"
        code += "table.CHUNK = 40\n"
        options = [f"--model={place}/base", "--dtype=float32"]
        options += [option.format(place=place) for option in adapter]
        options += ["--task=icd", f"--input={tmp_path}/cases.csv", f"--output={output}"]
        return subprocess.Popen(
            [sys.executable, "-c", code + "command.run(predict.main)"]
            + [*options, "--max_new_tokens=12", "--batch=2"],
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": ""},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    quiet, killed = tmp_path / "quiet.csv", tmp_path / "killed.csv"
    assert start(quiet).wait() == 0
    journal, place_file = tmp_path / ".killed.csv.answers", tmp_path / ".killed.csv.place.json"

    def rows():
        return json.loads(place_file.read_text())["rows"] if place_file.exists() else 0

    # In the first chunk, with some of its answers given; then in a later one.
    for far_enough in (lambda: journal.exists() and journal.stat().st_size, lambda: rows() > 40):
        process = start(killed)
        while process.poll() is None and not far_enough():
            time.sleep(0.002)
        time.sleep(rng.random() / 20)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not killed.exists()
    assert rows() > 0
    # Another model, here without the adapter, inherits nothing of it.
    other = tmp_path / "other.csv"
    for name in (".part", ".place.json", ".answers"):
        shutil.copy(tmp_path / f".killed.csv{name}", tmp_path / f".other.csv{name}")
    assert start(other, ()).wait() == 0
    assert other.read_bytes() != quiet.read_bytes()
    assert start(killed).wait() == 0
    assert killed.read_bytes() == quiet.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cases.csv",
        "killed.csv",
        "other.csv",
        "quiet.csv",
    ]


def test_a_bad_row_is_told_by_number_and_stops_nothing(place, tmp_path):
    """And Windows-1252, which `prepare` reads, is read."""
    path = tmp_path / "cases.csv"
    path.write_bytes("id,diagnosis\n1,Prostata, groß\n2,Brustkrebs, €\n3,übel\n".encode("cp1252"))
    output = tmp_path / "answers.csv"
    options = [f"--workdir={place}/run", f"--input={path}", f"--output={output}"]
    code, out, err = predict(*options, "--constrained=table", "--max_new_tokens=12")
    assert code == 0, err
    rows = read(output)
    assert [row["id"] for row in rows] == ["1", "2", "3"]
    assert [row["problem"] for row in rows] == ["not of 2 columns, as the header is"] * 2 + [""]
    assert [row["diagnosis"] for row in rows] == ["Prostata, groß", "Brustkrebs, €", "übel"]
    assert is_leaf(rows[2]["answer"]) and float(rows[2]["gap"]) >= 0
    assert "1 of 3 rows answered" in out and ": row 2, 3" in err and "Windows-1252" in err
    assert "Prostata" not in out + err
    bad = tmp_path / "cases.jsonl"
    bad.write_text('{"diagnosis": "lung"}\n["no"]\n{"diagnosis": "skin"\n')
    rows = list(open_rows(bad, ragged=True))
    assert rows == [(1, ["lung"]), (2, []), (3, [])]


@pytest.mark.parametrize("kind", ["csv", "xlsx", "jsonl"])
def test_blank_rows_come_out_where_they_were(kind, tmp_path):
    """Blank lines, rows that were emptied and rows that a workbook does not store; those behind the
    last one are none."""
    path = tmp_path / f"cases.{kind}"
    if kind == "xlsx":
        book = openpyxl.Workbook()
        for place, cells in {1: ("id", "diagnosis"), 2: (1, "lung"), 6: (2, "skin")}.items():
            for column, value in enumerate(cells, 1):
                book.active.cell(place, column, value)
        book.active.cell(4, 2, "")
        book.active.cell(8, 1).number_format = "0.00"
        book.save(path)
    elif kind == "csv":
        path.write_text("id,diagnosis\n1,lung\n\n\n\n2,skin\n\n\n")
    else:
        path.write_text('{"id": 1, "diagnosis": "lung"}\n\n \n\n{"id": 2, "diagnosis": "skin"}\n\n')
    rows, problems = answered(path, tmp_path)
    assert [(row["id"], row["diagnosis"]) for row in rows] == [
        ("1", "lung"), ("", ""), ("", ""), ("", ""), ("2", "skin"),
    ]  # fmt: skip
    first = 2 if kind == "jsonl" else 3
    assert problems == {"empty diagnosis": [first, first + 1, first + 2]}
    assert [bool(row["answer"]) for row in rows] == [True, False, False, False, True]
    assert open_rows(path, ragged=True).count == 5 and open_rows(path).count == 2


def test_line_ends_that_were_written_twice_and_stray_cells_make_no_rows(tmp_path):
    path = tmp_path / "cases.csv"
    path.write_bytes(b'id,diagnosis\r\r\n1,lung\r\r\n2,"a\r\r\nb"\r\r\n')
    rows = open_rows(path, ragged=True)
    assert list(rows) == [(2, ["1", "lung"]), (3, ["2", "a\r\r\nb"])]
    path.write_bytes(b"id,diagnosis\r" + b"1,lung\r\r" * 2000)  # of an old Macintosh
    assert open_rows(path, ragged=True).count == 3999
    book = openpyxl.Workbook()
    for place, value in {1: "diagnosis", 2: "lung", 1003: "skin", 40_000: "stray"}.items():
        book.active.cell(place, 1, value)
    book.save(tmp_path / "cases.xlsx")
    rows = list(open_rows(tmp_path / "cases.xlsx", ragged=True))
    assert [number for number, _ in rows] == [*range(2, 1004), 40_000]


def test_the_sheet_and_the_encoding_can_be_said(place, tmp_path):
    book = openpyxl.Workbook()
    for sheet, text in ((book.active, "lung"), (book.create_sheet("Mine"), "skin")):
        sheet.append(["diagnosis"])
        sheet.append([text])
    book.save(tmp_path / "cases.xlsx")
    (tmp_path / "cases.csv").write_bytes("diagnosis\nübel\n".encode("cp437"))

    def asked(name, *flags):
        output = tmp_path / f"{name}{len(flags)}.csv"
        options = (f"--workdir={place}/run", f"--input={tmp_path / name}", f"--output={output}")
        code, _, err = predict(*options, *flags)
        return err if code else [row["diagnosis"] for row in read(output)]

    told = asked("cases.xlsx")
    assert "several sheets hold cells (Sheet, Mine); choose one with --sheet" in told
    assert asked("cases.xlsx", "--sheet=Mine") == ["skin"]
    assert "no sheet 'Other'; there are Sheet, Mine" in asked(
        "cases.xlsx", "--sheet=Other", "--overwrite"
    )
    assert asked("cases.csv", "--encoding=cp437") == ["übel"]


# Rows 3 to 5 have quotes, a byte and a NUL that do not belong there; row 6 is blank, row 7 is one
# cell too long, row 8 (whose quote nothing closes) takes no row with it.
DAMAGED = b"""id,diagnosis,note\r
1,"left\nbreast",\xc3\xa9\r
2,"left" breast,x\r
3,Brust, gro\xdf\r
4,sk\0in,\r
\r
5,pros,tate, "a"\r
6,"lung,a\r
7,rectum,b\r
8,"an""us",c\r
"""


def answered(path, tmp_path, **decoder):
    """Rows of the output, by the stand-in decoder, and the problems that are told."""
    output = tmp_path / "answers.csv"
    rows = open_rows(path, ragged=True)
    told = answer_rows(rows, "diagnosis", TASKS["icd"], Decoder(**decoder), output, {})
    return read(output), {name: entry["first"] for name, entry in told.problems.items()}


def test_damaged_rows_come_out_as_they_came_in(tmp_path, monkeypatch):
    path = tmp_path / "cases.csv"
    path.write_bytes(DAMAGED)
    rows, problems = answered(path, tmp_path)
    quotes, no_text = "its quotes do not match", "bytes that are no text in utf-8"
    wide = "not of 3 columns, as the header is"
    assert [(row["id"], row["diagnosis"], row["note"], row["problem"]) for row in rows] == [
        ("1", "left\nbreast", "é", ""),
        ("2", '"left" breast', "x", quotes),
        ("3", "Brust", " gro\\xdf", no_text),
        ("4", "sk\\x00in", "", no_text),
        ("", "", "", "empty diagnosis"),
        ("5", "pros", 'tate, "a"', wide),
        ("6", '"lung', "a", quotes),
        ("7", "rectum", "b", ""),
        ("8", 'an"us', "c", ""),
    ]
    assert problems == {quotes: [3, 8], no_text: [4, 5], wide: [7], "empty diagnosis": [6]}
    assert [row["answer"] for row in rows] == ["C61", "", "", "", "", "", "", "C61", "C61"]
    # A quote that nothing closes is given up after a while, not at the end of a long file.
    monkeypatch.setattr(tables, "_BLOCK", 100)
    lines = "".join(f"{number},lung\n" for number in range(200))
    path.write_text(f'id,diagnosis\nx,"skin\n{lines}', newline="")
    rows, problems = answered(path, tmp_path)
    assert problems == {quotes: [2]} and len(rows) == 201
    assert rows[0]["diagnosis"] == '"skin' and rows[200]["id"] == "199"
    lines = f"1,{'lung ' * 200}\n" * 5000
    path.write_text(f'id,diagnosis\nx,"skin\n{lines}', newline="")
    tracemalloc.start()
    try:
        assert open_rows(path, ragged=True).count == 5001
        assert tracemalloc.get_traced_memory()[1] < 5e6  # of which most finds the delimiter
    finally:
        tracemalloc.stop()
    # A header must be right, and `prepare` takes none of these files.
    path.write_bytes(b'id,"diag" nosis\n1,lung\n')
    with pytest.raises(ValueError, match="the header cannot be read: its quotes do not match"):
        open_rows(path, ragged=True)
    path.write_bytes(DAMAGED)
    with pytest.raises(ValueError, match="line 6 holds a NUL byte"):
        open_rows(path)
    path.write_bytes(DAMAGED.replace(b"\0", b""))
    with pytest.raises(ValueError, match="line 5, byte 13 is not UTF-8"):
        open_rows(path)
    path.write_bytes(DAMAGED.replace(b"\0", b"").replace(b"\xdf", b""))
    with pytest.raises(ValueError, match="row 3 .*quotes"):
        open_rows(path)


def test_a_parquet_cell_that_cannot_be_read_stops_no_other_row(tmp_path):
    """Text that is no UTF-8 comes out with its bytes, a date beyond Python's years empty."""
    texts = [b"lung", b"gro\xdf", b"skin", b"anus"]
    offsets = pyarrow.array([0, *itertools.accumulate(map(len, texts))], pyarrow.int32()).buffers()
    text = pyarrow.StringArray.from_buffers(4, offsets[1], pyarrow.py_buffer(b"".join(texts)))
    when = pyarrow.array([0, 0, 1 << 50, 0], pyarrow.timestamp("s"))
    path = tmp_path / "cases.parquet"
    parquet.write_table(pyarrow.table({"diagnosis": text, "when": when}), path)
    rows, problems = answered(path, tmp_path)
    assert problems == {"a cell cannot be read": [3, 4]}
    assert [(row["diagnosis"], row["when"], row["answer"]) for row in rows] == [
        ("lung", "1970-01-01", "C61"),
        ("gro\\xdf", "1970-01-01", ""),
        ("skin", "", ""),
        ("anus", "1970-01-01", "C61"),
    ]
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        open_rows(path)


def test_progress_is_told_while_answers_arrive(tmp_path, monkeypatch, capsys):
    """Not at the ends of chunks alone: one chunk may take half an hour."""
    write_csv(tmp_path / "cases.csv", [{"diagnosis": str(number)} for number in range(100)])
    clock = itertools.count(0, 5)  # seconds; one look at it for each answer
    monkeypatch.setattr(table, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    rows, _ = answered(tmp_path / "cases.csv", tmp_path)
    assert len(rows) == 100
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 99 * 5 // 30
    assert told[0] == "7 of 100 rows, 0.2 rows/s, 465 s left"


def test_progress_without_a_row_yet_is_not_told(monkeypatch, capsys):
    """Where half a minute went by before the first answer, as in skipping what is done."""
    now = [100.0]
    monkeypatch.setattr(table, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with table._Progress(lines=True, total=50, initial=20, disable=True) as bar:
        for seconds, rows in ((40, 0), (31, 0), (9, 10), (31, 10)):
            now[0] += seconds
            bar.update(rows)
    # The first 40 seconds are no measure of the pace: 10 rows in 40, then 20 in 71.
    told = capsys.readouterr().err.splitlines()
    assert told == ["30 of 50 rows, 0.2 rows/s, 80 s left", "40 of 50 rows, 0.3 rows/s, 36 s left"]


def test_each_label_s_probability_and_a_prompt_beyond_training_have_columns(tmp_path):
    labels = {"photon": -0.5, "proton": -1.0, "electron": -2.0, "brachytherapy": -4.0}
    task, output = TASKS["modality"], tmp_path / "answers.csv"

    class Scoring(Decoder):
        def answer(self, task, prompts):
            return [
                Generation("photon", [1], -0.5, True, 0.5, label_logprobs=labels) for _ in prompts
            ]

    write_csv(tmp_path / "cases.csv", [{"diagnosis": text} for text in ("lung", " ", "x" * 701)])
    rows = open_rows(tmp_path / "cases.csv", ragged=True)
    decoder = Scoring(constraints={"modality": SimpleNamespace(labels=tuple(labels))})
    answer_rows(rows, "diagnosis", task, decoder, output, {})
    names = [f"logprob_{label}" for label in labels]
    first, empty, long = read(output)
    assert list(first)[-6:] == ["gap", "beyond_training", *names]
    assert [float(first[name]) for name in names] == list(labels.values())
    assert [empty[name] for name in names] == [""] * 4
    assert [row["beyond_training"] for row in (first, empty, long)] == ["False", "", "True"]


# What `predict` says its answers depend on, for each list of arguments; nothing is answered.
SOURCES = """
import json, sys
from absl import flags
from radonc_jax import predict
from radonc_jax.decoding.table import Told
predict.answer_rows = lambda *given: print(json.dumps(given[-1])) or Told({}, 0, 0)
for arguments in json.load(sys.stdin):
    for name in ("model", "adapter", "task"):
        flags.FLAGS[name].unparse()
    flags.FLAGS(["predict", *arguments])
    predict.main()
"""


def test_answers_of_another_scale_or_rotation_are_of_another_source(place, tmp_path):
    """The arrays are the same; `adapter_config.json` or `config.json` says what to do with them."""
    shutil.copytree(place / "peft", tmp_path / "peft")
    shutil.copytree(place / "base", tmp_path / "base")
    for file, key, factor in (
        (tmp_path / "peft" / "adapter_config.json", "lora_alpha", 0.5),
        (tmp_path / "base" / "config.json", "rope_theta", 2.0),
    ):
        content = json.loads(file.read_text())
        holder = content if key in content else content["rope_parameters"]
        holder[key] *= factor
        file.write_text(json.dumps(content))
    common = ["--task=icd", "--dtype=float32", f"--input={place}/cases.csv"]
    common += [f"--output={tmp_path}/answers.csv"]
    commands = [
        [f"--model={base}/base", f"--adapter={peft}/peft", *common]
        for base, peft in ((place, place), (place, place), (place, tmp_path), (tmp_path, place))
    ]
    commands.append([f"--workdir={place}/run", *common[2:]])
    done = subprocess.run(
        [sys.executable, "-c", SOURCES],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": ""},
        input=json.dumps(commands),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    sources = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    first, again, scaled, rotated, run = sources
    assert first == again
    for other, key in ((scaled, "lora"), (rotated, "architecture")):
        assert [name for name in first if first[name] != other[name]] == [key]
    assert (first["lora"]["alpha"], scaled["lora"]["alpha"]) == (8.0, 4.0)
    assert (first["trained_prompt"], run["trained_prompt"]) == (None, 2047)


def test_a_run_on_a_base_with_another_config_is_refused(place, tmp_path):
    """Its weights are the same; what the run was made from is told by its manifest."""
    shutil.copytree(place / "run", tmp_path / "run")
    shutil.copytree(place / "base", tmp_path / "base")
    origin = loading.base_origin("base", place / "base", True)
    (tmp_path / "run" / "manifest.json").write_text(json.dumps({"base": origin}))
    path = tmp_path / "base" / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"sliding_window": 100}))
    with pytest.raises(ValueError, match=r"manifest.json: config.json \w{8}, here \w{8}\)"):
        loading.load_run(tmp_path / "run", model=str(tmp_path / "base"))
    # Its weights are looked at too; a manifest of an older version tells them in its own way.
    frozen = loading.load_run(place / "run").frozen
    for told, right in ((fingerprint(frozen), True), (fingerprint(frozen, ""), True), ("0", False)):
        content = {"base": origin, "base_fingerprint_before": told}
        (tmp_path / "run" / "manifest.json").write_text(json.dumps(content))
        if right:
            loading.load_run(tmp_path / "run", model=str(place / "base"))
            continue
        message = (
            r"fingerprint of the weights (\w{8}), here (?!\1)\w{8}\)\. The base wanted is base"
        )
        with pytest.raises(ValueError, match=f"another base than .*{message}.* as --base"):
            loading.load_run(tmp_path / "run", model=str(place / "base"))
    (tmp_path / "run" / "manifest.json").write_text(json.dumps({"base": origin}))
    with pytest.raises(ValueError, match=r"fingerprint of the weights not there, here \w{8}\)"):
        loading.load_run(tmp_path / "run", model=str(place / "base"))


def test_codes_of_the_run_s_cohort_alone(place, tmp_path):
    """Of its training and validation cases, from the copy in the run's own folder."""
    shutil.copytree(place / "run", tmp_path / "run")
    reports.make_cohort(tmp_path / "run" / "cohort")
    (tmp_path / "run" / "cohort" / "excluded.csv").unlink()  # not needed, and older copies lack it
    output = tmp_path / "answers.csv"
    flags = [f"--workdir={tmp_path}/run", f"--input={place}/cases.csv", f"--output={output}"]
    code, _, err = predict(*flags, "--constrained=cohort", "--max_new_tokens=12")
    assert code == 0, err
    answers = [row["answer"] for row in read(output) if not row["problem"]]
    records = load_records(tmp_path / "run" / "cohort", "train", for_run=True)
    codes = {record.icd10 for record in records}
    assert len(answers) == 3 and set(answers) <= codes


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Answers at once; those of `broken` have a log-probability that is no number."""

    progress: object = None
    journal: object = None
    broken: frozenset = frozenset()
    constraints: dict = dataclasses.field(default_factory=dict)

    def prompt(self, task, diagnosis):
        return Prompt(diagnosis, trimmed=False, fits=True, beyond=len(diagnosis) > 700)

    def answer(self, task, prompts):
        texts = [prompt.tokens for prompt in prompts]
        for text in texts:
            self.journal.add(self.journal.key((), text), {"tokens": [1]})
            self.progress.update()
        values = [math.nan if text in self.broken else -1.0 for text in texts]
        return [Generation("C61", [1], value, True, 0.5) for value in values]


@pytest.mark.parametrize("chunk", [1, 3])
def test_interrupted_before_any_row_is_written_it_begins_with_one_header(
    tmp_path, monkeypatch, chunk
):
    """Twice in the first chunk, once (where there is one) in the second."""
    monkeypatch.setattr(table, "CHUNK", chunk)
    write_csv(tmp_path / "cases.csv", [{"diagnosis": name} for name in "123"])
    rows = open_rows(tmp_path / "cases.csv", ragged=True)
    output = tmp_path / "answers.csv"
    calls = []

    class Interrupted(Decoder):
        def answer(self, task, prompts):
            calls.append(len(prompts))
            if len(calls) in (1, 2, 4):
                raise KeyboardInterrupt
            return super().answer(task, prompts)

    given = rows, "diagnosis", TASKS["icd"], Interrupted(), output, {"of": "this"}
    for _ in range(3 if chunk == 1 else 2):
        with pytest.raises(KeyboardInterrupt):
            answer_rows(*given)
    answer_rows(*given)
    assert [row["diagnosis"] for row in read(output)] == ["1", "2", "3"]


def test_what_is_taken_over_or_thrown_away_is_told_and_counts_are_of_all_rows(
    tmp_path, monkeypatch, capsys
):
    """Interrupted in the second chunk of two rows, with one of its answers given."""
    monkeypatch.setattr(table, "CHUNK", 2)
    answers = {"1": "C61", "2": "C99.9", "3": "Z99.99", "4": "no code", "5": "C50"}
    write_csv(tmp_path / "cases.csv", [{"diagnosis": name} for name in answers])
    rows = open_rows(tmp_path / "cases.csv", ragged=True)
    output = tmp_path / "answers.csv"

    class Answering(Decoder):
        stop = "4"

        def answer(self, task, prompts):
            found = []
            for prompt in prompts:
                if prompt.tokens == self.stop:
                    raise KeyboardInterrupt
                self.journal.add(self.journal.key((), prompt.tokens), {"tokens": [1]})
                text, cut = answers[prompt.tokens], prompt.tokens in "25"
                found.append(Generation(text, [1], -1.0, True, 0.5, cut))
            return found

    class Going(Answering):
        stop = None

    def ask(decoder, **source):
        return answer_rows(rows, "diagnosis", TASKS["icd"], decoder(), output, source)

    for settings in ({"batch": 1, "task": "x"}, {"batch": 1, "task": "y"}, {"batch": 2}):
        with pytest.raises(KeyboardInterrupt):
            ask(Answering, **settings)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith(str(output))]
    other = f"{output}: what a run with another {{}} has left is thrown away"
    assert told == [other.format("task"), other.format("batch, task")]
    assert ask(Going, batch=2) == ({}, 2, 2)
    told = capsys.readouterr().err
    assert (
        f"{output}: 2 rows of an interrupted run are taken over, and up to 1 answers more\n" in told
    )
    assert [row["parsed"] for row in read(output)] == ["C61", "C99.9", "Z99.99", "", "C50"]
    # Of what was thrown away no answer is left either, nor is it counted.
    Answering.stop = "2"
    for batch in (3, 4):
        with pytest.raises(KeyboardInterrupt):
            ask(Answering, batch=batch)
    assert ask(Going, batch=4) == ({}, 2, 2)
    told = capsys.readouterr().err
    assert (
        f"{output}: 0 rows of an interrupted run are taken over, and up to 1 answers more\n" in told
    )


@pytest.mark.parametrize(("broken", "left"), [({"2"}, {"1", "3"}), ({"1", "2", "3"}, set())])
def test_an_answer_whose_probability_is_not_finite_is_none(tmp_path, broken, left):
    write_csv(tmp_path / "cases.csv", [{"diagnosis": name} for name in "123"])

    output = tmp_path / "answers.csv"
    rows = open_rows(tmp_path / "cases.csv", ragged=True)
    given = rows, "diagnosis", TASKS["icd"], Decoder(broken=frozenset(broken)), output, {}
    if not left:
        with pytest.raises(ValueError, match="rows 2 to 4: no answer has a log-probability"):
            answer_rows(*given)
        assert not output.exists()
        return
    told = answer_rows(*given)
    assert told.problems == {"log-probability not finite": {"rows": 1, "first": [3]}}
    for row in read(output):
        if row["diagnosis"] in left:
            assert (row["answer"], row["problem"], row["gap"]) == ("C61", "", "0.5")
            assert row["beyond_training"] == "False"
        else:
            assert set(row.values()) == {row["diagnosis"], "", "log-probability not finite"}


def write_many(path, count):
    """A table of `count` rows with 600 characters each, of which every third has no diagnosis."""
    texts = [os.urandom(300).hex() if number % 3 else "" for number in range(count)]
    if path.suffix == ".parquet":  # in one row group, as up to a million rows are
        pd.DataFrame({"diagnosis": texts}).to_parquet(path)
        return
    if path.suffix == ".xlsx":
        text, none = '<c t="s"><v>{}</v></c>', "<c r='B{}'><v>1</v></c>"
        cells = [text.format(0) + none.format(1)]
        for number, given in enumerate(texts, 1):
            cells.append(text.format(number) if given else none.format(number + 1))
        rows = (f'<row r="{number}" ht="30">{cell}</row>' for number, cell in enumerate(cells, 1))
        write_workbook(path, rows, (f"<si><t>{text}</t></si>" for text in ["diagnosis", *texts]))
        return
    csv_, json_ = ("diagnosis\n", '"{}"\n'), ("", '{{"diagnosis": "{}"}}\n')
    head, line = csv_ if path.suffix == ".csv" else json_
    with path.open("w") as file:
        file.write(head)
        file.writelines(line.format(text) for text in texts)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "xlsx"])
def test_memory_does_not_grow_with_the_rows(kind, tmp_path, monkeypatch):
    """Neither Python's nor pyarrow's; nor what is told of rows without an answer."""
    arrow = []  # bytes that pyarrow holds while a chunk is answered
    answer = Decoder.answer

    def watched(self, task, prompts):
        arrow.append(pyarrow.total_allocated_bytes())
        return answer(self, task, prompts)

    monkeypatch.setattr(Decoder, "answer", watched)
    monkeypatch.setattr(tables, "_BLOCK", 1 << 18)

    def peak(count):
        path, output = tmp_path / f"{count}.{kind}", tmp_path / "answers.csv"
        write_many(path, count)
        before = pyarrow.total_allocated_bytes()
        arrow.clear()
        tracemalloc.start()
        try:
            rows = open_rows(path, ragged=True)
            told = answer_rows(rows, "diagnosis", TASKS["modality"], Decoder(), output, {})
            python = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        ((problem, entry),) = told.problems.items()
        assert (problem, entry["rows"]) == ("empty diagnosis", len(range(0, count, 3)))
        assert len(entry["first"]) == 20
        with output.open(newline="") as file:
            problems = [row["problem"] for row in csv.DictReader(file)]
        assert len(problems) == count and problems.count(problem) == entry["rows"]
        return python + max(arrow) - before

    # Workbooks are slow to read.
    few, many = map(peak, (2500, 12_500) if kind == "xlsx" else (5000, 25_000))
    # 20,000 rows more are 8 MB of text; the reader holds a block of them and the writer a chunk.
    assert many < few + 2e6, (few, many)


ERRORS = [
    (["--output={new}"], "give either --workdir"),
    (["--workdir={run}", "--model={base}", "--output={new}"], "give either --workdir"),
    (["--workdir={run}", "--adapter={peft}", "--output={new}"], "--adapter goes with --model"),
    (["--model=/nowhere/model", "--task=icd", "--output={new}"], r"\(model=/path/to/folder"),
    (["--model={base}", "--base={base}", "--output={new}"], "--base goes with --workdir"),
    (["--workdir={place}", "--output={new}"], "is not a run folder: it has no config.json"),
    (["--workdir={run}", "--step=7", "--output={new}"], r"no checkpoint 7; it has \[3\]"),
    (["--model={base}", "--output={new}"], "--task must be one of regimen, modality, icd"),
    (["--workdir={run}", "--task=dose", "--output={new}"], "modality, icd, not 'dose'"),
    (["--workdir={run}", "--output={cases}"], "must not be the input"),
    (["--workdir={run}", "--output={other}"], "exists: choose another file, or pass --overwrite"),
    (["--workdir={run}", "--output={new}.xlsx"], "must end in .csv"),
    (["--workdir={run}", "--output={new}", "--column=Dx"], "'Dx'.*there: id, diagnosis, note"),
    (["--workdir={run}", "--output={new}", "--column=DIAGNOSIS"], r"mean 'diagnosis'\?\)\. Col"),
    (
        ["--workdir={run}", "--output={new}", "--input={bare}"],
        "row 1 has 2 cells and looks like a record; put the names",
    ),
    (["--workdir={run}", "--output={new}", "--input={done}"], "already has the columns answer"),
    (
        ["--workdir={run}", "--output={new}", "--input={place}/x.csv"],
        "x.csv: no such file; give the cases",
    ),
    (["--workdir={run}", "--output={new}", "--max_new_tokens=512"], "leaves no room"),
    (["--workdir={run}", "--output={new}", "--batch=0"], "must be at least 1"),
    (["--workdir={run}", "--output={new}", "--constrained=table"], "allowed has 9 tokens: raise"),
    (["--workdir={run}", "--output={new}", "--constrained=cohort"], "cohort that the run was made"),
    (["--model={base}", "--task=icd", "--output={new}", "--constrained=cohort"], "needs --workdir"),
    (["--workdir={run}", "--output={new}", "stray"], "unexpected argument 'stray'"),
]
# The command's own `main` again and again, because starting Python anew takes seconds.
DRIVER = """
import json, sys
from absl import flags
from radonc_jax import command, predict
for arguments in json.load(sys.stdin):
    flags.FLAGS.unparse_flags()
    for name in flags.FLAGS.flags_by_module_dict()["radonc_jax.predict"]:
        flags.FLAGS[name.name].unparse()
    left = flags.FLAGS(["predict", *arguments])
    try:
        command.guard(predict.main)(left)
        print(json.dumps("no error"))
    except SystemExit as error:
        print(json.dumps(error.code))
"""


def test_user_errors_are_one_line_and_write_nothing(place, tmp_path):
    write_csv(tmp_path / "done.csv", [{"diagnosis": SECRET, "answer": "C61"}])
    (tmp_path / "other.csv").write_text("kept")
    (tmp_path / "bare.csv").write_text(f"17,{SECRET}\n18,{SECRET}\n")
    names = {name: place / name for name in ("run", "base", "peft")}
    names |= {"new": tmp_path / "new.csv", "other": tmp_path / "other.csv", "place": place}
    names |= {
        "bare": tmp_path / "bare.csv",
        "done": tmp_path / "done.csv",
        "cases": place / "cases.csv",
    }
    before = sorted(path.name for path in tmp_path.iterdir())
    commands = [
        [argument.format(**names) for argument in ["--input={cases}", *arguments]]
        for arguments, _ in ERRORS
    ]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": ""},
        input=json.dumps(commands),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    messages = [json.loads(line) for line in done.stdout.splitlines()]
    for (arguments, expected), message in zip(ERRORS, messages, strict=True):
        assert message.startswith("error: "), arguments
        assert re.search(expected, message), (arguments, message)
        assert "\n" not in message
    assert "Zebra" not in done.stdout + done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (tmp_path / "other.csv").read_text() == "kept"


RECORDS = [
    {"id": "1", "diagnosis": "a, b", "dose": "2.5"},
    {"id": "2", "diagnosis": "", "dose": "60"},
    {"id": "3", "diagnosis": "c\nd", "dose": ""},
]


@pytest.mark.parametrize("kind", ["csv", "xlsx", "parquet", "jsonl"])
def test_rows_are_the_same_from_every_kind_of_file(kind, tmp_path):
    path = tmp_path / f"cases.{kind}"
    if kind == "csv":
        write_csv(path, RECORDS)
    elif kind == "xlsx":
        pd.DataFrame(RECORDS).to_excel(path, index=False)
    elif kind == "parquet":
        pd.DataFrame(RECORDS).to_parquet(path)
    else:
        lines = [{name: value for name, value in r.items() if value} for r in RECORDS]
        lines[1]["dose"] = 60
        path.write_text("\n\n".join(json.dumps(line) for line in lines))
    rows = open_rows(path)
    columns = list(RECORDS[0])
    numbers = [1, 3, 5] if kind == "jsonl" else [2, 3, 4]
    assert sorted(rows.columns) == sorted(columns)
    assert rows.count == 3
    for _ in range(2):  # it can be read again
        read_again = list(rows)
        assert [number for number, _ in read_again] == numbers
        assert [dict(zip(rows.columns, v, strict=True)) for _, v in read_again] == RECORDS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"id,diagnosis\n1,Zebra\n2,Zebra,x\n", "row 3 .*has 3 columns, the header has 2"),
        ("a.csv", b'id,diagnosis\n1,"Zebra\n', "row 2 .*quotes"),
        ("a.csv", b"id,diagnosis\n1,Zebra\n2,Zebra\xff\n", "not UTF-8"),
        ("a.csv", b"id,id\n1,2\n", "columns 1, 2 share names"),
        ("a.csv", b"id,diagnosis\n", "no rows"),
        ("a.csv", b"", "no rows"),
        ("a.txt", b"Zebra", "use one of .csv, .xlsx, .parquet, .jsonl"),
        ("a.xlsx", b"Zebra", "not a readable workbook"),
        ("a.parquet", b"Zebra", "not a readable Parquet file"),
        ("a.jsonl", b'{"diagnosis": "x"}\n{"diagnosis": "Zebra\n', "line 2 is not JSON"),
        ("a.jsonl", b'{"diagnosis": "x"}\n["Zebra"]\n', "line 2 is not an object"),
    ],
)
def test_damaged_tables_are_refused_without_quoting_them(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        open_rows(path)
    assert "Zebra" not in str(error.value)
