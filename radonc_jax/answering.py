"""Lets one model answer a split and writes what came of it: the end of `train`, and `evaluate`."""

import json
from pathlib import Path

import numpy as np
from jax.experimental import multihost_utils

from radonc_jax import parallel, tracking
from radonc_jax.data import cohort
from radonc_jax.evaluation import run as evaluation

SOURCE = "source.json"


def answer_split(decode, records, tasks, *, split, model, output: Path | None, config, origin):
    """Decodes, scores and, where `output` names a folder, writes answers, scores and their source.

    Answers that are already there from the same source are kept, and not decoded again.

    Args:
      decode: prompts -> generations, as `decoding.scheduler.text_decoder` makes it.
      records, tasks: what is asked.
      split, model: names, for the files.
      output: folder for predictions.jsonl, metrics.json and source.json, or None.
      config: the run's settings.
      origin: {"step", "trained_fingerprint", "base"} of the model that answers.

    Returns:
      What `evaluation.run.evaluate` returns.
    """
    main = parallel.is_main_process()
    source = origin | {
        "cohort": tracking.cohort_sha256(config.cohort),
        "task": config.task,
        "max_new_tokens": config.decode.max_new_tokens,
        "seed": config.seed,
    }
    if output is not None:
        there = np.int32(main and _is_there(output, source))
        if parallel.several_processes():  # all of them decode, or none
            there = multihost_utils.broadcast_one_to_all(there)
        if there:
            return json.loads((output / evaluation.METRICS).read_text(encoding="utf-8"))
        if main:
            (output / SOURCE).unlink(missing_ok=True)  # of the answers to be replaced
    result = evaluation.evaluate(
        decode,
        records,
        tasks,
        split=split,
        model=model,
        output=output if main else None,
        seed=config.seed,
        ceiling=cohort.load_manifest(config.cohort).get("ceiling"),
    )
    if output is not None and main:
        tracking.write_json(output / SOURCE, source | {"environment": tracking.environment()})
    return result


def _is_there(output: Path, source: dict) -> bool:
    path = output / SOURCE
    if not path.is_file():
        return False
    there = json.loads(path.read_text(encoding="utf-8"))
    there.pop("environment")
    return there == source
