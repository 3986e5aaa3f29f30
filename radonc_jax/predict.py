"""Answers one task for new cases: the rows of a table, with their answers beside them.

    python -m radonc_jax.predict --workdir=runs/mistral_icd --input=cases.csv --output=answers.csv
    python -m radonc_jax.predict --model=BASE --adapter=PEFT --task=icd --input=... --output=...

The output holds every row of the input in its order, with further columns: `answer` (the model's
text), `parsed` (what the task reads in it; empty if nothing), `logprob`, `finished` (False: cut
off at the longest answer) and `problem` (why a row has no answer).
"""

import csv
import itertools
import json
import os
import sys
from pathlib import Path

from absl import flags
from tqdm import tqdm

from radonc_jax import command, loading, parallel, settings
from radonc_jax.data.batches import encode_prompt
from radonc_jax.data.rows import Rows, open_rows
from radonc_jax.decoding.scheduler import Scheduler, text_decoder
from radonc_jax.tasks import TASKS

_WORKDIR = flags.DEFINE_string("workdir", None, "Run folder of the tuned model; or give --model.")
_STEP = flags.DEFINE_string("step", "best", "With --workdir: best, latest or a checkpoint's step.")
_MODEL = flags.DEFINE_string("model", None, "Hugging Face folder or hub id, instead of --workdir.")
_ADAPTER = flags.DEFINE_string("adapter", None, "With --model: PEFT folder or run folder.")
_DTYPE = flags.DEFINE_string("dtype", "bfloat16", "With --model: bfloat16 or float32.")
_TASK = flags.DEFINE_string("task", None, f"{', '.join(TASKS)}; left out, the run's only task.")
_INPUT = flags.DEFINE_string("input", None, "Cases: .csv, .xlsx, .parquet or .jsonl.")
_COLUMN = flags.DEFINE_string("column", "diagnosis", "The input's column with the diagnosis text.")
_OUTPUT = flags.DEFINE_string("output", None, "A .csv file to be written.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace an existing output.")
_BATCH = flags.DEFINE_integer("batch", None, "Cases decoded together; the run's, or 32.")
_NEW = flags.DEFINE_integer("max_new_tokens", None, "Longest answer; the run's, or 128.")
flags.mark_flags_as_required(["input", "output"])

ADDED = ("answer", "parsed", "logprob", "finished", "problem")
CHUNK = 4096  # rows in memory at a time; within them, prompts of like length go together


def main():
    # ---- what can be wrong is found before a model is loaded -----------------------------------
    if (_WORKDIR.value is None) == (_MODEL.value is None):
        raise ValueError("give either --workdir (a run) or --model (a Hugging Face folder)")
    if _ADAPTER.value is not None and _MODEL.value is None:
        raise ValueError("--adapter goes with --model; a --workdir has its own adapter")
    decode_config = settings.DecodeConfig(batch=32, max_new_tokens=128)
    task_name = _TASK.value
    if _WORKDIR.value is not None:
        run = run_settings(Path(_WORKDIR.value))
        decode_config = run.decode
        task_name = task_name or run.task
    if task_name not in TASKS:
        raise ValueError(f"--task must be one of {', '.join(TASKS)}, not {task_name!r}")
    task = TASKS[task_name]
    output = Path(_OUTPUT.value)
    if output.suffix.lower() != ".csv":
        raise ValueError(f"--output={output} must end in .csv")
    if output.absolute() == Path(_INPUT.value).absolute():
        raise ValueError(f"--output={output} must not be the input")
    if output.exists() and not _OVERWRITE.value:
        raise FileExistsError(f"{output} exists: choose another file, or pass --overwrite")
    rows = open_rows(_INPUT.value)
    if _COLUMN.value not in rows.columns:
        raise ValueError(
            f"{rows.path}: no column {_COLUMN.value!r}; choose it with --column. "
            f"Columns there: {', '.join(rows.columns)}"
        )
    taken = [name for name in ADDED if name in rows.columns]
    if taken:
        raise ValueError(f"{rows.path} already has the columns {', '.join(taken)}: rename them")

    # ---- model ---------------------------------------------------------------------------------
    parallel.initialize()
    parallel.quiet_third_parties()
    if _WORKDIR.value is not None:
        model = loading.load_run(_WORKDIR.value, _STEP.value)
    else:
        model = loading.load_model(_MODEL.value, _ADAPTER.value, _DTYPE.value)
    scheduler = Scheduler(
        model.partition,
        model.mesh,
        batch=decode_config.batch if _BATCH.value is None else _BATCH.value,
        max_new_tokens=decode_config.max_new_tokens if _NEW.value is None else _NEW.value,
        stops=model.stops,
        context=model.config.max_position_embeddings,
    )

    # ---- answers -------------------------------------------------------------------------------
    main_process = parallel.is_main_process()
    output.parent.mkdir(parents=True, exist_ok=True)
    # Beside the output and renamed at the end: a file of that name is whole. Every process of a
    # run decodes, one of them writes.
    aside = output.with_name(f".{output.name}.{os.getpid()}.part")
    try:
        with open(aside if main_process else os.devnull, "w", encoding="utf-8", newline="") as file:
            problems = answer_rows(rows, task, model, scheduler, csv.writer(file))
        if main_process:
            os.replace(aside, output)
    finally:
        aside.unlink(missing_ok=True)
    if main_process:
        unanswered = sum(len(numbers) for numbers in problems.values())
        print(f"{rows.count - unanswered} of {rows.count} rows answered: {output}")
        for problem, numbers in problems.items():
            shown = ", ".join(map(str, numbers[:20])) + ", ..." * (len(numbers) > 20)
            print(f"{len(numbers)} not answered, {problem}: row {shown}", file=sys.stderr)


def run_settings(workdir: Path) -> settings.Settings:
    """Of a run folder; FileNotFoundError when it is none."""
    path = workdir / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{workdir} is not a run folder: it has no config.json")
    return settings.from_mapping(json.loads(path.read_text(encoding="utf-8")))


def answer_rows(
    rows: Rows, task, model: loading.LoadedModel, scheduler: Scheduler, writer
) -> dict[str, list[int]]:
    """Writes each row with its answer; returns the numbers of the rows without one, by reason."""
    problems: dict[str, list[int]] = {}
    column = rows.columns.index(_COLUMN.value)
    writer.writerow([*rows.columns, *ADDED])
    # None: shown in terminals only.
    hidden = None if parallel.is_main_process() else True
    with tqdm(total=rows.count, desc=task.name, unit="row", disable=hidden) as bar:
        decode = text_decoder(
            scheduler, model.tokenizer, model.trainable, model.frozen, progress=bar
        )
        stream = iter(rows)
        while chunk := list(itertools.islice(stream, CHUNK)):
            prompts: dict[int, str] = {}
            added: dict[int, list] = {}
            for number, values in chunk:
                problem = ""
                prompt = task.prompt(values[column])
                if not values[column].strip():
                    problem = "empty diagnosis"
                elif len(encode_prompt(model.tokenizer, prompt)) > scheduler.room:
                    problem = f"prompt longer than {scheduler.room} tokens"
                if problem:
                    problems.setdefault(problem, []).append(number)
                    added[number] = ["", "", "", "", problem]
                    bar.update()
                else:
                    prompts[number] = prompt
            for number, answer in zip(prompts, decode(list(prompts.values())), strict=True):
                parsed = task.parse(answer.text)
                added[number] = [answer.text, parsed, answer.logprob, answer.finished, ""]
            writer.writerows([*values, *added[number]] for number, values in chunk)
    return problems


if __name__ == "__main__":
    command.run(main)
