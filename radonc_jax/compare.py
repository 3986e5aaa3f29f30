"""The paper's table over finished runs: report.json, report.html, figure.svg and figure.png.

python -m radonc_jax.compare --runs=runs/regimen,runs/modality,runs/icd --output=report
python -m radonc_jax.compare --runs=runs/old,runs/new --against=old --output=report
"""

from pathlib import Path

from absl import flags, logging

from radonc_jax import command
from radonc_jax.evaluation.findings import read_run
from radonc_jax.evaluation.report import write_runs

_RUNS = flags.DEFINE_list("runs", None, "Run folders, each with both models' evaluation.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write the report to.")
_SPLIT = flags.DEFINE_string("split", "test", "Split whose evaluations are compared.")
_AGAINST = flags.DEFINE_string(
    "against", None, "Name of the run (its folder's) that the other runs are compared with."
)
_TEXT = flags.DEFINE_bool(
    "include_text", True, "Show the cases; without, no text, case id or small group is in any file."
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the bootstrap.")


def main() -> None:
    logging.set_verbosity(logging.WARNING)  # the ROUGE scorer announces itself
    runs = [read_run(Path(folder), _SPLIT.value) for folder in _RUNS.value if folder]
    if not runs:
        raise ValueError("--runs names no folder")
    report = write_runs(
        runs,
        Path(_OUTPUT.value),
        include_text=_TEXT.value,
        figures=True,
        against=_AGAINST.value,
        seed=_SEED.value,
    )
    for task, entry in report["tasks"].items():
        original, tuned = entry["original"]["accuracy"], entry["tuned"]["accuracy"]
        print(
            f"{task}: accuracy {original['value']:.3f} original, {tuned['value']:.3f} tuned, "
            f"one-sided Wilcoxon p = {entry['tests']['wilcoxon']['p_value']:.2g}"
        )
    print(f"wrote {Path(_OUTPUT.value) / 'report.html'}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["runs", "output"])
    command.run(main)
