"""Blinded review by physicians: a page to rate two answers per case, and the scoring of ratings.

The page holds neither the reference nor which model wrote which answer; that is in the key file,
which the raters must not have. Ratings are kept in the rater's browser and leave it as a CSV file
only by the rater's own hand.
"""

import csv
import hashlib
import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from sklearn.metrics import cohen_kappa_score

from radonc_jax.evaluation.findings import NOTICE
from radonc_jax.evaluation.markup import escape
from radonc_jax.evaluation.run import MODELS, write_file
from radonc_jax.evaluation.run_folder import Run
from radonc_jax.evaluation.statistics import bootstrap_mean, wilcoxon_one_sided

CORRECTNESS = {
    1: "wrong",
    2: "mostly wrong",
    3: "mostly right",
    4: "right",
}
HARM = {0: "none", 1: "minor", 2: "serious"}
ACCEPTABLE = {0: "no", 1: "yes"}
_SCALES = {"correctness": CORRECTNESS, "harm": HARM, "acceptable": ACCEPTABLE}
COLUMNS = ("kit", "item", "answer", *_SCALES, "rater")


# ---------------------------------------------------------------------------------------------
# Building a kit
# ---------------------------------------------------------------------------------------------


def build_review(run: Run, task: str, output: Path, *, cases: int, seed: int) -> dict:
    """Writes the page `output` and key.json beside it; returns the key.

    Args:
      run: a run whose cohort is at hand, for the diagnoses.
      cases: how many to rate, drawn at random; 0 is all.
      seed: of the draw, the order of the items and which answer is A.

    Raises:
      ValueError: the task was not evaluated, or the diagnoses of its cases are not at hand.
    """
    place = f"run folder {run.provenance.get('workdir', run.name)}"
    if task not in run.predictions["tuned"]:
        known = ", ".join(run.predictions["tuned"])
        raise ValueError(
            f"{place} has no answers of task {task!r}; it has {known}: choose with --task"
        )
    answers = {model: {p["case_id"]: p for p in run.predictions[model][task]} for model in MODELS}
    diagnoses = {record.case_id: record.diagnosis for record in run.held_out}
    absent = answers["tuned"].keys() - diagnoses.keys()
    if absent or answers["tuned"].keys() != answers["original"].keys():
        raise ValueError(
            f"{place}: {len(absent)} of {len(answers['tuned'])} cases have no diagnosis at "
            "hand, or the models answered different cases; the cohort that the run's config.json "
            "names must be there, or --cohort say where it is"
        )
    rng = random.Random(seed)
    chosen = sorted(diagnoses.keys() & answers["tuned"].keys())
    rng.shuffle(chosen)
    chosen = chosen[:cases] if cases else chosen
    items, shown = [], []
    for number, case in enumerate(chosen, 1):
        first, second = rng.sample(MODELS, 2)
        items.append(
            {
                "item": number,
                "case_id": case,
                "patient_id": answers["tuned"][case]["patient_id"],
                "A": first,
                "B": second,
            }
        )
        shown.append(
            {
                "item": number,
                "diagnosis": diagnoses[case],
                "A": answers[first][case]["output"].strip(),
                "B": answers[second][case]["output"].strip(),
            }
        )
    content = json.dumps(shown, sort_keys=True).encode()
    kit = hashlib.sha256(content).hexdigest()[:12]
    key = {"kit": kit, "task": task, "run": run.name, "seed": seed, "items": items}
    write_file(output, _page(kit, shown))
    write_file(output.with_name("key.json"), json.dumps(key, indent=1) + "\n")
    return key


def _question(item: int, answer: str, name: str, scale: Mapping[int, str]) -> str:
    choices = "".join(
        f'<label><input type="radio" name="{item}-{answer}-{name}" value="{value}"> {text}</label>'
        for value, text in scale.items()
    )
    return f"<fieldset><legend>{name.capitalize()}</legend>{choices}</fieldset>"


def _page(kit: str, shown: Sequence[Mapping]) -> str:
    articles = []
    for item in shown:
        answers = "".join(
            f"<section><h3>Answer {answer}</h3><blockquote>{escape(item[answer]) or '(empty)'}"
            "</blockquote>"
            + "".join(_question(item["item"], answer, *scale) for scale in _SCALES.items())
            + "</section>"
            for answer in "AB"
        )
        articles.append(
            f"<article><h2>Case {item['item']} of {len(shown)}</h2>"
            f"<p class=diagnosis>{escape(item['diagnosis'])}</p>{answers}</article>"
        )
    return (
        _PAGE.replace("@NOTICE@", NOTICE)
        .replace("@KIT@", kit)
        .replace("@COLUMNS@", json.dumps(COLUMNS))
        .replace("@SCALES@", json.dumps(list(_SCALES)))
        .replace("@CASES@", str(len(shown)))
        # Last: a diagnosis that happens to hold one of the marks stays as it is.
        .replace("@ARTICLES@", "\n".join(articles))
    )


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Blinded review</title>
<style>
:root { color-scheme: light dark; }
body { margin: 0 auto; max-width: 48rem; padding: 1rem; font: 16px/1.5 system-ui, sans-serif;
  overflow-wrap: anywhere; }
.notice { border-left: 4px solid #c0392b; padding-left: .8rem; }
article { border-top: 2px solid #8885; padding: .5rem 0 1rem; }
.diagnosis, blockquote { white-space: pre-wrap; background: #8882; padding: .5rem .8rem;
  margin: .5rem 0; }
fieldset { border: 1px solid #8885; margin: .4rem 0; }
label { display: inline-block; margin-right: 1rem; padding: .25rem 0; }
header { position: sticky; top: 0; background: Canvas; padding: .5rem 0; }
</style>
</head>
<body>
<h1>Blinded review</h1>
<p class="notice"><strong>@NOTICE@</strong></p>
<p>Rate each answer by itself. The order of the two answers is random. Ratings stay in this browser
until you download them.</p>
<header><label>Rater <input id="rater" autocomplete="off"></label>
<button id="download" type="button">Download ratings</button> <span id="state"></span></header>
<main>
@ARTICLES@
</main>
<script>
"use strict";
const kit = "@KIT@", columns = @COLUMNS@, scales = @SCALES@, total = @CASES@ * 2 * scales.length;
const place = "radonc_jax-review-" + kit;
const saved = JSON.parse(localStorage.getItem(place) || "{}");
const rater = document.getElementById("rater");
const show = () => {
  const done = Object.keys(saved).filter(key => key !== "rater").length;
  document.getElementById("state").textContent = done + " of " + total + " ratings";
};
const keep = () => { localStorage.setItem(place, JSON.stringify(saved)); show(); };
rater.value = saved.rater || "";
rater.addEventListener("input", () => { saved.rater = rater.value; keep(); });
for (const input of document.querySelectorAll("input[type=radio]")) {
  input.checked = saved[input.name] === input.value;
  input.addEventListener("change", () => { saved[input.name] = input.value; keep(); });
}
document.getElementById("download").addEventListener("click", () => {
  const quote = text => '"' + String(text).replaceAll('"', '""') + '"';
  const lines = [columns.join(",")];
  for (let item = 1; item <= @CASES@; item++) for (const answer of ["A", "B"]) {
    const values = scales.map(scale => saved[item + "-" + answer + "-" + scale] || "");
    if (values.some(value => value !== ""))
      lines.push([kit, item, answer, ...values, saved.rater || ""].map(quote).join(","));
  }
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([lines.join("\\n") + "\\n"], {type: "text/csv"}));
  link.download = "ratings.csv";
  link.click();
  URL.revokeObjectURL(link.href);
});
show();
</script>
</body>
</html>
"""


# ---------------------------------------------------------------------------------------------
# Scoring ratings
# ---------------------------------------------------------------------------------------------

Ratings = dict[tuple[int, str], dict[str, int | None]]  # (item, model) -> scale -> rating


def read_ratings(path: Path, key: Mapping) -> Ratings:
    """One rater's CSV, with the models put in place of A and B. An empty cell is None.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a column is missing, or a row is of another kit, is no item of the key, stands
        twice or holds a value off its scale; file and line are named.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    items = {str(item["item"]): item for item in key["items"]}
    ratings: Ratings = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        absent = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if absent:
            raise ValueError(f"{path}: no column {', '.join(absent)}; download the ratings again")
        for row in reader:
            place = f"{path}, line {reader.line_num}"
            if row["kit"] != key["kit"]:
                raise ValueError(f"{place}: rated from another page than the key belongs to")
            if row["item"] not in items or row["answer"] not in ("A", "B"):
                raise ValueError(f"{place}: item and answer are none of the key's")
            item = items[row["item"]]
            rated = (item["item"], item[row["answer"]])
            if rated in ratings:
                raise ValueError(f"{place}: this answer is rated twice")
            ratings[rated] = {}
            for scale, values in _SCALES.items():
                if row[scale] and row[scale] not in map(str, values):
                    allowed = ", ".join(map(str, values))
                    raise ValueError(f"{place}: {scale} must be one of {allowed}")
                ratings[rated][scale] = int(row[scale]) if row[scale] else None
    if not ratings:
        raise ValueError(f"{path} holds no ratings")
    return ratings


def score_ratings(
    raters: Mapping[str, Ratings], key: Mapping, *, bootstrap: int = 1000, seed: int = 0
) -> dict:
    """The content of review.json.

    Per model the mean over items of the raters' mean rating, for each scale, with 95 % intervals
    by patient: `acceptable` is then the share of acceptable answers. `wilcoxon` per scale, one-
    sided that the tuned model is better (for harm: lower), over the items rated for both models.
    `kappa` per pair of raters and scale: Cohen's, quadratic weights for the ordered scales, none
    for acceptable; null where both gave one and the same rating throughout, since kappa is then
    undefined.
    """
    patients = {item["item"]: item["patient_id"] for item in key["items"]}
    result: dict = {"kit": key["kit"], "task": key["task"], "n_items": len(patients)}
    means = {scale: _mean_ratings(raters.values(), scale) for scale in _SCALES}
    result["models"] = {model: {"n": 0} for model in MODELS}
    result["wilcoxon"] = {}
    for scale, by_answer in means.items():
        for model in MODELS:
            rated = [item for item, rated_model in sorted(by_answer) if rated_model == model]
            if not rated:
                raise ValueError(f"no rater gave a rating of {scale} to the {model} model")
            result["models"][model]["n"] = max(result["models"][model]["n"], len(rated))
            result["models"][model][scale] = bootstrap_mean(
                [by_answer[item, model] for item in rated],
                [patients[item] for item in rated],
                resamples=bootstrap,
                seed=seed,
                share=scale == "acceptable",
            )
        both = [i for i in patients if all((i, model) in by_answer for model in MODELS)]
        sign = -1 if scale == "harm" else 1
        result["wilcoxon"][scale] = wilcoxon_one_sided(
            [sign * by_answer[item, "tuned"] for item in both],
            [sign * by_answer[item, "original"] for item in both],
        )
    result["kappa"] = [
        {"raters": [first, second]} | _agreement(raters[first], raters[second])
        for first, second in itertools.combinations(raters, 2)
    ]
    return result


def _mean_ratings(raters, scale: str) -> dict[tuple[int, str], float]:
    collected: dict[tuple[int, str], list[int]] = {}
    for ratings in raters:
        for rated, values in ratings.items():
            if values[scale] is not None:
                collected.setdefault(rated, []).append(values[scale])
    return {rated: sum(values) / len(values) for rated, values in collected.items()}


def _agreement(first: Ratings, second: Ratings) -> dict:
    agreement = {}
    for scale, values in _SCALES.items():
        pairs = [
            (first[rated][scale], second[rated][scale])
            for rated in sorted(first.keys() & second.keys())
            if first[rated][scale] is not None and second[rated][scale] is not None
        ]
        kappa = math.nan
        # With one rating throughout, expected agreement is 1 and kappa 0 / 0.
        if len({rating for pair in pairs for rating in pair}) > 1:
            kappa = cohen_kappa_score(
                *zip(*pairs, strict=True),
                labels=list(values),
                weights=None if scale == "acceptable" else "quadratic",
            )
        agreement[scale] = {
            "n": len(pairs),
            "kappa": None if math.isnan(kappa) else float(kappa),
        }
    return agreement


def read_key(path: Path) -> dict:
    """key.json as `build_review` wrote it.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it is no key file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; it was written beside the review page")
    try:
        key = json.loads(path.read_text(encoding="utf-8"))
        fields = {"item", "patient_id", "A", "B"}
        if all(fields <= item.keys() for item in key["items"]) and {"kit", "task"} <= key.keys():
            return key
    except (json.JSONDecodeError, TypeError, KeyError, AttributeError):
        pass
    raise ValueError(f"{path} is no key file of a review")
