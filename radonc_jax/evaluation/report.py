"""report.json and report.html of one or more run folders: written, and made fit to be shared.

`evaluation.findings` has the figures, `evaluation.page` the page.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from radonc_jax.evaluation.figures import figure_bytes
from radonc_jax.evaluation.findings import Run, build_report, read_run
from radonc_jax.evaluation.page import accuracy_figure, render_page
from radonc_jax.evaluation.run import write_file
from radonc_jax.tasks import TASKS

SMALL_CELL = 11  # counts below this are not published (convention of the US CMS)


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


def write_runs(
    runs: Sequence[Run],
    output: Path,
    *,
    include_text: bool = True,
    figures: bool = False,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict:
    """Writes the report over `runs` into the folder `output`; `figures` adds figure.svg and .png.

    Everything is made before the first file is written, and each file is put in place whole.

    Args:
      include_text: False leaves all clinical text and all small groups out of every file (see
        `publish`).
    """
    report = build_report(runs, bootstrap=bootstrap, seed=seed)
    if not include_text:
        report = publish(report)
    files: dict[str, str | bytes] = {}
    if figures:
        drawn = accuracy_figure(report)
        files |= {f"figure.{kind}": figure_bytes(drawn, kind) for kind in ("svg", "png")}
    files["report.html"] = render_page(report, runs, include_text=include_text)
    files["report.json"] = json.dumps(report, indent=1, allow_nan=False) + "\n"
    for name, content in files.items():
        write_file(output / name, content)
    return report


# ---------------------------------------------------------------------------------------------
# The form to share
# ---------------------------------------------------------------------------------------------

# Parts of an entry that tell of groups of cases; elsewhere "n" is all of them.
_OF_GROUPS = ("details", "subgroups", "confidence", "robustness")


def publish(report: Mapping) -> dict:
    """The content of report.json without text or id of any case, and without small groups.

    A group of fewer than SMALL_CELL cases keeps neither its name nor its figures; of classes that
    small only the number is told (`classes_hidden`), and a confusion matrix that is not of a
    task's own few labels is left out, since its labels are those of single cases.
    """

    return {
        **report,
        "tasks": {
            task: _published(entry, TASKS[task].labels is not None)
            for task, entry in report["tasks"].items()
        },
    }


def _published(entry: Mapping, closed: bool) -> dict:
    """`closed`: the task has a set of labels of its own."""
    result = {}
    for key, value in entry.items():
        if key == "further_runs":
            result[key] = [_published(other, closed) for other in value]
        elif key in _OF_GROUPS:
            result[key] = _without_small_groups(value)
        else:
            result[key] = _without_classes(value, closed)
    return result


def _without_small_groups(content):
    if isinstance(content, list):
        return [_without_small_groups(item) for item in content]
    if not isinstance(content, Mapping):
        return content
    content = dict(content)
    if "high_rouge_wrong" in content:
        content["high_rouge_wrong_n"] = len(content.pop("high_rouge_wrong"))
    n = content.get("n")
    if isinstance(n, int) and 0 < n < SMALL_CELL:
        shown = {"n": f"<{SMALL_CELL}", "group": "small group", "by": content.get("by")}
        shown |= {key: content[key] for key in ("bin", "expected") if key in content}
        return {key: shown.get(key) for key in content}
    return {key: _without_small_groups(value) for key, value in content.items()}


def _without_classes(content, closed: bool):
    """Metrics, wherever they stand in `content`, without their small classes."""
    if not isinstance(content, Mapping):
        return content
    if "per_class" not in content:
        return {key: _without_classes(value, closed) for key, value in content.items()}
    classes, confusion = content["per_class"], content["confusion"]
    large = {label: scores for label, scores in classes.items() if scores["support"] >= SMALL_CELL}
    return {
        **content,
        "per_class": large,
        "classes_hidden": len(classes) - len(large),
        "confusion": {
            "labels": confusion["labels"] if closed else [],
            "matrix": [_without_small_cells(row) for row in confusion["matrix"] if closed],
        },
    }


def _without_small_cells(row: Sequence[int]) -> list[int | None]:
    """Small counts become None, and never a single one, which the row's sum would give away."""
    shown = [None if 0 < n < SMALL_CELL else n for n in row]
    if shown.count(None) == 1:
        others = [i for i, n in enumerate(shown) if n]
        if others:
            shown[min(others, key=lambda i: shown[i])] = None
    return shown
