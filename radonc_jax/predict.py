"""Answers one task for new cases: the rows of a table, with their answers beside them.

    python -m radonc_jax.predict --workdir=runs/mistral_icd --input=cases.csv --output=answers.csv
    python -m radonc_jax.predict --model=BASE --adapter=PEFT --task=icd --input=... --output=...

The output holds every row of the input in its order, blank lines and rows of a workbook without any
cell too where others follow, with further columns: `answer` (the model's text), `parsed` (what the
task reads in it; empty if nothing; of ICD-10 anything that has the shape of a code, see
--constrained), `logprob`, `finished` (False: cut off at the longest answer), `trimmed` (True: the
diagnosis was cut, as in training, because the prompt was longer than any there or did not fit the
context), `problem` (why a row has no answer), `gap` (the smallest distance of the two best logits:
where it is small, another device or batch may answer otherwise) and `beyond_training` (True: the
prompt is longer than any in training, and was not cut). Where labels are scored each has its log-
probability (`logprob_photon`, ...).

A row that cannot be read does not stop the others; it comes out as it came in: with too many cells,
these stand in its last column; a CSV row whose quotes do not match ends with its line and keeps
its quotes as they stand; bytes that are no text are written as \\xff; a line of JSONL that is no
object, and a Parquet cell that is no text and cannot be read, come out empty.
With --constrained=table|cohort the answers come from closed sets (modality: its four labels; icd:
the codes of the code table, or of the training and validation cases of the run's cohort).

Rows stream through, so memory does not grow with their number (the texts of a workbook, which lie
in one table there, are in a temporary file without a name meanwhile). Killed and started again with
the same arguments, it goes on where it was; the file is then the same to the byte (in float32 on
one CPU device; elsewhere near ties may be answered otherwise). What is taken over of a run that
was interrupted is told, as is what was left of one with other arguments, which is thrown away.

At the end are told how many rows were answered, with how many of these a diagnosis was cut
(`trimmed`), with how many the code does not exist (is not in the ICD-10-CM code table), and the
numbers of the rows without an answer.
"""

import sys
from pathlib import Path

from absl import flags

from radonc_jax import command, loading, parallel, settings, tracking
from radonc_jax.answering import allowed_codes
from radonc_jax.data.batches import prompt_room
from radonc_jax.data.extract import did_you_mean, looks_like_a_record
from radonc_jax.data.rows import open_rows
from radonc_jax.decoding.constrain import CODES
from radonc_jax.decoding.table import added_columns, answer_rows
from radonc_jax.decoding.text import TextDecoder, constrain_task
from radonc_jax.tasks import TASKS
from radonc_jax.training import step as training_step

_WORKDIR = flags.DEFINE_string("workdir", None, "Run folder of the tuned model; or give --model.")
_BASE = flags.DEFINE_string(
    "base", None, "With --workdir: the base's folder here, where it is not the config's."
)
_STEP = flags.DEFINE_string("step", "best", "With --workdir: best, latest or a checkpoint's step.")
_MODEL = flags.DEFINE_string("model", None, "Hugging Face folder or hub id, instead of --workdir.")
_ADAPTER = flags.DEFINE_string("adapter", None, "With --model: PEFT folder or run folder.")
_DTYPE = flags.DEFINE_string("dtype", "bfloat16", "With --model: bfloat16 or float32.")
_TASK = flags.DEFINE_string("task", None, f"{', '.join(TASKS)}; left out, the run's only task.")
_INPUT = flags.DEFINE_string("input", None, "Cases: .csv, .xlsx, .parquet or .jsonl.")
_COLUMN = flags.DEFINE_string("column", "diagnosis", "The input's column with the diagnosis text.")
_SHEET = flags.DEFINE_string("sheet", "", "Of a workbook with several.")
_ENCODING = flags.DEFINE_string("encoding", "", "Of a csv or tsv; found out if not given.")
_OUTPUT = flags.DEFINE_string("output", None, "A .csv file to be written.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace an existing output.")
_BATCH = flags.DEFINE_integer("batch", None, "Cases decoded together; the run's, or 32.")
_NEW = flags.DEFINE_integer("max_new_tokens", None, "Longest answer; the run's, or 128.")
_OVER_LENGTH = flags.DEFINE_enum(
    "over_length",
    None,
    ["fail", "trim_diagnosis"],
    "A prompt longer than any of the run's training is answered, or its diagnosis is cut; one too "
    "long for the context has no answer, or is cut. As the run, or fail.",
)
_CONSTRAINED = flags.DEFINE_enum(
    "constrained", "", ["", *CODES], "Answers from closed sets; where the ICD-10-CM codes are from."
)
flags.mark_flags_as_required(["input", "output"])


def main():
    # ---- what can be wrong is found before a model is loaded -----------------------------------
    if (_WORKDIR.value is None) == (_MODEL.value is None):
        raise ValueError("give either --workdir (a run) or --model (a Hugging Face folder)")
    if _ADAPTER.value is not None and _MODEL.value is None:
        raise ValueError("--adapter goes with --model; a --workdir has its own adapter")
    if _BASE.value is not None and _WORKDIR.value is None:
        raise ValueError("--base goes with --workdir; without a run, --model is the base")
    decode_config = settings.DecodeConfig(batch=32, max_new_tokens=128)
    over_length, trained = "fail", None
    task_name = _TASK.value
    if _WORKDIR.value is not None:
        run = loading.read_settings(_WORKDIR.value, _BASE.value)
        decode_config = run.decode
        over_length = run.batch.over_length
        trained = prompt_room(run.batch.sequence_length)
        task_name = task_name or run.task
    if task_name not in TASKS:
        raise ValueError(f"--task must be one of {', '.join(TASKS)}, not {task_name!r}")
    task = TASKS[task_name]
    if _CONSTRAINED.value and not task.has_classes:
        raise ValueError(f"--constrained: task {task_name} is answered in free text; leave it out")
    if _CONSTRAINED.value == "cohort" and _WORKDIR.value is None:
        raise ValueError(
            "--constrained=cohort needs --workdir: it takes the codes of the run's cohort. With "
            "--model pass --constrained=table"
        )
    output = Path(_OUTPUT.value)
    if output.suffix.lower() != ".csv":
        raise ValueError(f"--output={output} must end in .csv")
    if output.absolute() == Path(_INPUT.value).absolute():
        raise ValueError(f"--output={output} must not be the input")
    if output.exists() and not _OVERWRITE.value:
        raise FileExistsError(f"{output} exists: choose another file, or pass --overwrite")
    if not Path(_INPUT.value).exists():
        raise FileNotFoundError(f"{_INPUT.value}: no such file; give the cases with --input")
    rows = open_rows(_INPUT.value, encoding=_ENCODING.value, sheet=_SHEET.value, ragged=True)
    if _COLUMN.value not in rows.columns:
        if looks_like_a_record(rows.columns):
            raise ValueError(
                f"{rows.path}: row 1 has {len(rows.columns)} cells and looks like a record; put "
                "the names of the columns into it"
            )
        raise ValueError(
            f"{rows.path}: no column {_COLUMN.value!r}; choose it with --column"
            f"{did_you_mean(_COLUMN.value, rows.columns)}. Columns there: {', '.join(rows.columns)}"
        )
    added = added_columns(task, bool(_CONSTRAINED.value))
    taken = [name for name in added if name in rows.columns]
    if taken:
        raise ValueError(f"{rows.path} already has the columns {', '.join(taken)}: rename them")
    codes: list[str] = []
    if _CONSTRAINED.value:
        reads = _CONSTRAINED.value == "cohort" and task.name == "icd"
        folder = loading.find_cohort(run, _WORKDIR.value) if reads else None
        codes = allowed_codes(task, _CONSTRAINED.value, folder)

    # ---- model ---------------------------------------------------------------------------------
    parallel.initialize()
    parallel.quiet_third_parties()
    for note in rows.layout.notes if parallel.is_main_process() else ():
        print(note, file=sys.stderr, flush=True)
    if _WORKDIR.value is not None:
        model = loading.load_run(_WORKDIR.value, _STEP.value, model=run.model)
    else:
        model = loading.load_model(_MODEL.value, _ADAPTER.value, _DTYPE.value)
    constraints = {}
    if _CONSTRAINED.value:
        constraints = {task.name: constrain_task(model.tokenizer, task, codes)}
    longest = decode_config.max_new_tokens if _NEW.value is None else _NEW.value
    for constraint in constraints.values():
        constraint.check(longest)
    scheduler = model.scheduler(
        decode_config.batch if _BATCH.value is None else _BATCH.value,
        longest,
    )
    decoder = TextDecoder(
        scheduler,
        model.tokenizer,
        model.trainable,
        model.frozen,
        over_length if _OVER_LENGTH.value is None else _OVER_LENGTH.value,
        constraints=constraints,
        trained=trained,
    )

    # ---- answers -------------------------------------------------------------------------------
    source = {
        "input": tracking.file_sha256(rows.path),
        "column": _COLUMN.value,
        "read_as": [rows.layout.encoding, rows.layout.sheet],
        "task": task.name,
        "trained": training_step.fingerprint(model.trainable),
        "base": training_step.fingerprint(model.frozen),
        "compute": str(model.model.dtype),
        **loading.arithmetic(model.config, model.lora),
        "prompt": task.prompt(""),
        "over_length": decoder.over_length,
        "constrained": [constraint.digest for constraint in constraints.values()],
    } | decoder.source()
    output.parent.mkdir(parents=True, exist_ok=True)
    told = answer_rows(rows, _COLUMN.value, task, decoder, output, source)
    if parallel.is_main_process():
        unanswered = sum(entry["rows"] for entry in told.problems.values())
        of_these = f"{told.trimmed} with a diagnosis that was cut"
        if task.name == "icd":
            of_these += f", {told.unknown} with a code that does not exist"
        print(f"{rows.count - unanswered} of {rows.count} rows answered, {of_these}: {output}")
        for problem, entry in told.problems.items():
            shown = ", ".join(map(str, entry["first"]))
            shown += ", ..." * (entry["rows"] > len(entry["first"]))
            print(f"{entry['rows']} not answered, {problem}: row {shown}", file=sys.stderr)


if __name__ == "__main__":
    command.run(main)
