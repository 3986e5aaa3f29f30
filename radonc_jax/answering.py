"""Lets one model answer a split and writes what came of it: the end of `train`, and `evaluate`."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from radonc_jax import parallel, tracking
from radonc_jax.data import cohort
from radonc_jax.decoding.journal import Journal
from radonc_jax.decoding.text import Constraint, TextDecoder, constrain_task
from radonc_jax.evaluation import run as evaluation
from radonc_jax.evaluation.run_folder import Evaluation, read_evaluation
from radonc_jax.settings import Settings
from radonc_jax.tasks import Task, icd, select

JOURNAL = ".answers.jsonl"  # while answers are being given; token ids, as private as predictions


@dataclass(frozen=True)
class WatchfulDecoder(TextDecoder):
    """A decoder that can be stopped between two answers.

    Attributes:
      between: called after each answer, when the journal has it; what it raises ends the decoding.
        Equally often on all processes.
    """

    between: Callable[[], None] = lambda: None

    def _run(self, *arguments):
        for answered in super()._run(*arguments):
            yield answered
            self.between()


def allowed_codes(
    task: Task, codes: str, folder: str | Path | None, *, for_run: bool = True
) -> list[str]:
    """The ICD-10-CM codes that a task's answers are held to; empty for a task without codes.

    Args:
      task: that is asked.
      codes: "table" or "cohort", see `constraints`.
      folder: the cohort, which "cohort" needs.
      for_run: as `cohort.load_split` has it; False where no run was made from the cohort yet.
    """
    if task.name != "icd":
        return []
    if codes == "table":
        return icd.leaves()
    # Not those of the test cases, which would tell answers.
    return [
        task.reference(record)
        for split in ("train", "validation")
        for record in cohort.load_records(folder, split, for_run=for_run)
    ]


def constraints(
    config: Settings, tokenizer, codes: str = "", *, for_run: bool = True
) -> dict[str, Constraint]:
    """What the answers of a run's tasks can be held to, by task name; empty for free text alone.

    Args:
      config: of the run.
      tokenizer: of its model.
      codes: "table" for the leaves of the ICD-10-CM code table, "cohort" for the codes of the
        cohort's training and validation cases; "" for what `config.decode.constrained` says.
      for_run: whether `config` is that of a run, see `allowed_codes`.

    Raises:
      ValueError: a code is longer than `decode.max_new_tokens`.
    """
    found = {}
    for task in select(config.task):
        held_to = codes or config.decode.constrained
        allowed = allowed_codes(task, held_to, config.cohort, for_run=for_run)
        constraint = constrain_task(tokenizer, task, allowed)
        if constraint is None:
            continue
        constraint.check(config.decode.max_new_tokens)
        found[task.name] = constraint
    return found


def variant(model: str, constrained: Mapping[str, Constraint] | None) -> str:
    """Name of a model's answers, and of their folder: those from closed sets have their own."""
    return model if constrained is None else model + evaluation.CONSTRAINED


def answer_split(
    decoder: TextDecoder,
    records,
    tasks,
    *,
    split: str,
    model: str,
    output: Path | None,
    config: Settings,
    origin: Mapping,
    constrained: Mapping[str, Constraint] | None = None,
):
    """Decodes, scores and, where `output` names a folder, writes answers, scores and their source.

    Answers that are already there from the same source are kept, and not decoded again, but judged
    and scored anew where an earlier version of the code read or judged one otherwise, or where
    metrics.json does not name the answers that it is of; of an evaluation that was killed, those
    are kept that were finished. How many prompts are longer than any in training, and were not
    cut, is told and stands in the source.

    Args:
      decoder: of the model.
      records, tasks: what is asked.
      split, model: names, for the files; `variant` makes that of constrained answers.
      output: folder for predictions.jsonl, metrics.json and source.json, or None.
      config: the run's settings.
      origin: {"step", "trained_fingerprint", "base_fingerprint", "base"} of the model that answers,
        and what `loading.arithmetic` says of it; "examples", their number, and "constrained", where
        codes of closed sets are from, if any.
      constrained: from `constraints`; only tasks that have one are asked, and the answers lie apart
        from the free ones. None for free answers.

    Returns:
      What `evaluation.run.evaluate` returns.
    """
    main = parallel.is_main_process()
    source = dict(origin) | {
        "split": split,
        "model": model,
        "cohort": tracking.cohort_sha256(config.cohort),
        "task": config.task,
        "max_new_tokens": config.decode.max_new_tokens,
        "over_length": config.batch.over_length,
        "seed": config.seed,
    }
    if constrained is not None:
        tasks = [task for task in tasks if task.name in constrained]
        source["constraints"] = {
            name: f"{constraint.name} {constraint.digest}"
            for name, constraint in constrained.items()
        }
        decoder = replace(decoder, constraints=dict(constrained))
    source["answers"] = answer_source(decoder, config, origin)
    source["beyond_training"] = beyond = {
        task.name: sum(decoder.prompt(task, record.diagnosis).beyond for record in records)
        for task in tasks
    }
    for name, count in beyond.items() if main else ():
        if count:
            print(
                f"{name}, {split}: {count} of {len(records)} prompts are longer than any in "
                f"training ({decoder.trained} tokens)"
            )
    source["prompts_sha256"] = _prompts_sha256(records, tasks)
    options = {
        "split": split,
        "model": model,
        "seed": config.seed,
        # Of the patients of the test split, and so of no other.
        "ceiling": cohort.load_manifest(config.cohort).get("ceiling") if split == "test" else None,
    }
    journal = None
    if output is not None:
        # All processes decode, or none.
        kept = parallel.on_main(lambda: _kept(output, source, tasks, options))
        if kept is not None:
            return kept
        if main:
            (output / evaluation.SOURCE).unlink(missing_ok=True)  # of the answers to be replaced
        journal = Journal(output / JOURNAL, source["answers"])
    result = evaluation.evaluate(
        replace(decoder, journal=journal),
        records,
        tasks,
        output=output if main else None,
        **options,
    )
    if output is not None:
        if main:
            tracking.write_json(
                output / evaluation.SOURCE, source | {"environment": tracking.environment()}
            )
        journal.remove()
    return result


def answer_source(decoder: TextDecoder, config: Settings, origin: Mapping) -> dict:
    """All that an answer depends on besides its prompt and its constraint.

    Mesh and batch are in it, because they change the order in which numbers are added. In float32
    on one CPU device answers are the same to the byte, killed or not; elsewhere two tokens that are
    nearly as likely as each other may change places.
    """
    return {
        "trained": origin["trained_fingerprint"],
        "base": origin["base_fingerprint"],
        "architecture": origin["architecture"],
        "lora": origin["lora"],
        "precision": [config.precision.compute, config.precision.base],
    } | decoder.source()


def _prompts_sha256(records, tasks) -> str:
    prompts = [task.prompt(record.diagnosis) for task in tasks for record in records]
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()


def _kept(output: Path, source: Mapping, tasks, options: Mapping) -> dict | None:
    """The scores in `output` if they and the answers are of this source."""
    found = _find(output, source)
    if found is None:
        return None
    (output / JOURNAL).unlink(missing_ok=True)  # left by a kill after the last answer
    if found.judged_anew or not found.proven:
        evaluation.score_all(found.predictions, tasks, output=output, **options)
    return json.loads((output / evaluation.METRICS).read_text(encoding="utf-8"))


def _find(output: Path, source: Mapping) -> Evaluation | None:
    """The answers in `output` if they are of this source, and whole: files that do not belong
    together are written again."""
    needed = (evaluation.SOURCE, evaluation.PREDICTIONS, evaluation.METRICS)
    if not all((output / name).is_file() for name in needed):
        return None
    try:
        written = json.loads((output / evaluation.SOURCE).read_text(encoding="utf-8"))
        if _content(written) != _content(source):
            return None
        return read_evaluation(output, source["split"], source["model"])
    except ValueError:
        return None


def _content(source: Mapping) -> dict:
    """What the answers come from, wherever base and cohort lie: their hashes stay. So does that of
    a closed set, whatever it is called."""
    unread = ("base", "environment", "constrained")
    kept = {key: value for key, value in source.items() if key not in unread}
    return kept | {"cohort": source.get("cohort", {}).get("manifest_sha256")}
