"""Blinded review of original and tuned answers by physicians.

python -m radonc_jax.review --build --workdir=runs/regimen --output=review.html
python -m radonc_jax.review --build --workdir=runs/icd --task=icd --output=review.html
python -m radonc_jax.review --score --ratings=a.csv,b.csv --key=key.json --output=DIR
"""

import json
from pathlib import Path

from absl import flags

from radonc_jax import command
from radonc_jax.evaluation.review import build_review, read_key, read_ratings, score_ratings
from radonc_jax.evaluation.run import write_file
from radonc_jax.evaluation.run_folder import read_run

_BUILD = flags.DEFINE_bool("build", False, "Write the page to rate and its key.json.")
_SCORE = flags.DEFINE_bool("score", False, "Score ratings into review.json.")
_OUTPUT = flags.DEFINE_string("output", None, "Page to write (build) or folder (score).")
_WORKDIR = flags.DEFINE_string("workdir", None, "Build: run folder with both evaluations.")
_SPLIT = flags.DEFINE_string("split", "test", "Build: split whose answers are rated.")
_TASK = flags.DEFINE_string("task", "regimen", "Build: task whose answers are rated.")
_CASES = flags.DEFINE_integer("cases", 50, "Build: cases to rate, drawn at random; 0 is all.")
_COHORT = flags.DEFINE_string("cohort", None, "Build: cohort folder, if not the config's.")
_RATINGS = flags.DEFINE_list("ratings", None, "Score: one CSV file per rater.")
_KEY = flags.DEFINE_string("key", None, "Score: the key.json written with the page.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the draw and the order, or of the bootstrap.")


def main() -> None:
    if _BUILD.value == _SCORE.value:
        raise ValueError("give either --build or --score")
    if _BUILD.value:
        build()
    else:
        score()


def build() -> None:
    if not _WORKDIR.value:
        raise ValueError("--build needs --workdir, a run folder")
    output = Path(_OUTPUT.value)
    cohort = Path(_COHORT.value) if _COHORT.value else None
    run = read_run(Path(_WORKDIR.value), _SPLIT.value, cohort)
    key = build_review(run, _TASK.value, output, cases=_CASES.value, seed=_SEED.value)
    print(f"wrote {output} with {len(key['items'])} cases")
    print(f"wrote {output.with_name('key.json')}: keep it from the raters")


def score() -> None:
    if not _RATINGS.value or not _KEY.value:
        raise ValueError("--score needs --ratings, one CSV per rater, and --key")
    key = read_key(Path(_KEY.value))
    raters = {str(path): read_ratings(Path(path), key) for path in _RATINGS.value}
    result = score_ratings(raters, key, seed=_SEED.value)
    path = Path(_OUTPUT.value) / "review.json"
    write_file(path, json.dumps(result, indent=1, allow_nan=False) + "\n")
    for model, scores in result["models"].items():
        share = scores["acceptable"]
        print(
            f"{model}: {100 * share['value']:.1f} % acceptable "
            f"({100 * share['low']:.1f} to {100 * share['high']:.1f}), {scores['n']} items"
        )
    print(f"wrote {path}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["output"])
    command.run(main)
