"""report.json and report.html of one or more run folders, written.

`evaluation.findings` has the figures, `evaluation.page` the page.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from radonc_jax.evaluation.figures import figure_bytes
from radonc_jax.evaluation.findings import build_report
from radonc_jax.evaluation.page import accuracy_figure, render_page
from radonc_jax.evaluation.published import publish
from radonc_jax.evaluation.run import write_file
from radonc_jax.evaluation.run_folder import Run, read_run
from radonc_jax.evaluation.verdict import main_name, main_test

PAGE = "report.html"


def write_report(
    workdir: Path,
    split: str = "test",
    output: Path | None = None,
    *,
    cohort: Path | None = None,
    include_text: bool = True,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict:
    """Writes report.json and report.html of one run folder into it (or into `output`).

    Raises:
      FileNotFoundError, ValueError: see `read_run` and `compare_models`.
    """
    runs = [read_run(workdir, split, cohort)]
    return write_runs(
        runs, Path(output or workdir), include_text=include_text, bootstrap=bootstrap, seed=seed
    )


def describe(report: Mapping, output: Path) -> str:
    """What commands print at their end: a line for each task and for each two runs that were
    compared, or could not be, and where the page of `report`, in the folder `output`, is."""
    lines = []
    for task, entry in report["tasks"].items():
        original, tuned = entry["original"]["accuracy"], entry["tuned"]["accuracy"]
        lines.append(
            f"{task}: accuracy {original['value']:.3f} original, {tuned['value']:.3f} tuned, "
            f"n {entry['tuned']['n']}, "
            f"{_p(entry['tests'])}"
        )
        for other in (entry, *entry["further_runs"]):
            if other["against"] is not None:
                difference = other["against"]["tests"]["difference"]["value"]
                lines.append(
                    f"{task}: {other['run']} tuned against {other['against']['run']} tuned: "
                    f"{100 * difference:+.1f} points, {_p(other['against']['tests'])}"
                )
            if other["not_compared"] is not None:
                first, why = (other["not_compared"][key] for key in ("run", "why"))
                lines.append(f"{task}: {other['run']} not compared with {first}: {why}")
    return "\n".join([*lines, f"report: {output / PAGE}"])


def _p(tests: Mapping) -> str:
    return f"one-sided {main_name(tests)} p = {main_test(tests)['p_value']:.2g}"


def write_runs(
    runs: Sequence[Run],
    output: Path,
    *,
    include_text: bool = True,
    figures: bool = False,
    bootstrap: int = 1000,
    seed: int = 0,
    tell: Callable[[str], None] = lambda step: None,
) -> dict:
    """Writes the report over `runs` into the folder `output`; `figures` adds figure.svg and .png.

    Everything is made before the first file is written, and each file is put in place whole.

    Args:
      include_text: False leaves all clinical text and all small groups out of every file (see
        `publish`).
      tell: called with each step that takes a while, before it is begun.
    """
    for run in runs:
        for line in run.left_out:
            print(f"{run.name}: left out of the report: {line}", file=sys.stderr)
        for model, changed in run.judged_anew.items():
            for task, n in changed.items():
                print(
                    f"{run.name}: {model}, task {task}: {n} answers were read or judged otherwise "
                    "by an earlier version of the code; the report is of this one, evaluate again "
                    "to have predictions.jsonl and metrics.json of it too",
                    file=sys.stderr,
                )
    tell(f"scores, intervals, tests and baselines of {len(runs)} run(s)")
    report = build_report(runs, bootstrap=bootstrap, seed=seed)
    if not include_text:
        report = publish(report)
    tell("drawing figures, making the page" if figures else "making the page")
    files: dict[str, str | bytes] = {}
    if figures:
        drawn = accuracy_figure(report)
        files |= {f"figure.{kind}": figure_bytes(drawn, kind) for kind in ("svg", "png")}
    files[PAGE] = render_page(report, runs, include_text=include_text)
    files["report.json"] = json.dumps(report, indent=1, allow_nan=False) + "\n"
    for name, content in files.items():
        write_file(output / name, content)
    return report
