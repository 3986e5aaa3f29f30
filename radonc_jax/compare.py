"""The paper's table over finished runs: report.json, report.html, figure.svg and figure.png.

    python -m radonc_jax.compare --runs=runs/regimen,runs/modality,runs/icd --output=report
    python -m radonc_jax.compare --runs=runs/rank8,runs/rank16 --against=runs/rank8 --output=report

Each run's tuned model is compared with its original one and, where several runs answered the same
cases of a task, with another run's tuned model: the first of the task, or the run that --against
names (which is added to --runs; other cases are an error then). These tests, tuned against tuned,
stand in a table of their own under "Tests", and Holm adjusts over them as a family of their own.
What a run folder holds is enough; its cohort, where it is at hand, adds baselines and subgroups.
What it does is told step by step, and so is that a report in the output folder will be replaced.
"""

import sys
from pathlib import Path

from absl import flags, logging

from radonc_jax import command
from radonc_jax.data.splits import SPLITS
from radonc_jax.evaluation.findings import require_same_cases
from radonc_jax.evaluation.report import PAGE, describe, write_runs
from radonc_jax.evaluation.run_folder import read_run

_RUNS = flags.DEFINE_list("runs", None, "Run folders, each with both models' evaluation.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write the report to.")
_SPLIT = flags.DEFINE_enum("split", "test", SPLITS, "Split whose evaluations are compared.")
_AGAINST = flags.DEFINE_string(
    "against",
    None,
    "Run whose tuned model the others' are tested against, on the same cases; added to --runs.",
)
_TEXT = flags.DEFINE_bool(
    "include_text", True, "Show the cases; without, no text, case id or small group is in any file."
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the bootstrap.")


def main() -> None:
    logging.set_verbosity(logging.WARNING)  # the ROUGE scorer announces itself
    folders = [Path(folder) for folder in _RUNS.value if folder]
    if not folders:
        raise ValueError("--runs names no folder")
    against = None if _AGAINST.value is None else Path(_AGAINST.value)
    if against is not None:
        if against.resolve() not in [folder.resolve() for folder in folders]:
            folders.insert(0, against)
        # The first run of a task is the one that others are compared with.
        folders.sort(key=lambda folder: folder.resolve() != against.resolve())
    output = Path(_OUTPUT.value)
    if (output / PAGE).exists():
        _tell(f"{output} has a report already, which is replaced once the new one is made")
    runs = []
    for folder in folders:
        _tell(f"reading {folder}, split {_SPLIT.value}")
        runs.append(read_run(folder, _SPLIT.value))
    if against is not None:
        require_same_cases(runs)
    report = write_runs(
        runs,
        output,
        include_text=_TEXT.value,
        figures=True,
        seed=_SEED.value,
        tell=_tell,
    )
    print(describe(report, output))


def _tell(step: str) -> None:
    print(step, file=sys.stderr, flush=True)


if __name__ == "__main__":
    flags.mark_flags_as_required(["runs", "output"])
    command.run(main)
