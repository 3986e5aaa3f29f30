"""The cases behind the figures, for people to look through: embedded data that a script lists.

Texts of patients and of models are data throughout: JSON without any markup in the page, and
`textContent` in the script (page.js).
"""

import json
from collections.abc import Iterable, Mapping, Sequence

from radonc_jax.evaluation.confidence import confidence_of
from radonc_jax.evaluation.figures import TITLES
from radonc_jax.evaluation.findings import entries
from radonc_jax.evaluation.markup import DASH, escape, plain_cell
from radonc_jax.evaluation.run_folder import Run

MOST_CASES = 5000  # of a run and task; a browser should open the page at once
LONGEST_ANSWER = 2000  # characters; a model without a stop can go on for pages
WRONG, RIGHT, UNPARSEABLE = 0, 1, 2


def embed_json(content: object) -> str:
    """JSON that is safe inside a script element: no markup, no line separator, ASCII alone."""
    text = json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _cut(text: str) -> str:
    text = text.strip()
    return text if len(text) <= LONGEST_ANSWER else text[:LONGEST_ANSWER] + " ..."


class Texts:
    """The texts of all runs' cases, as the page shows them."""

    def __init__(self, runs: Sequence[Run], names: Sequence[str]):
        self.runs = dict(zip(names, runs, strict=True))
        self._tuned: dict[tuple[str, str], dict[str, Mapping]] = {}

    def _predictions(self, run: str, task: str) -> dict[str, Mapping]:
        key = run, task
        if key not in self._tuned:
            predictions = self.runs[run].predictions["tuned"].get(task, ())
            self._tuned[key] = {p["case_id"]: p for p in predictions}
        return self._tuned[key]

    def error(self, run: str, case: str) -> list[object]:
        prediction = self._predictions(run, "regimen").get(case)
        if prediction is None:
            return [case, DASH, DASH, DASH]
        output = _cut(prediction["output"])
        return [case, prediction["reference"], output, plain_cell(float(prediction["rouge1"]))]

    def explorer(self, report: Mapping) -> dict:
        """What the script reads: texts once, and cases that point to them, the most telling first.

        First the regimens whose words are right and whose dose or side is wrong, then wrong
        answers, those nearest to the reference in wording first, then right ones.
        """
        tasks = list(report["tasks"])
        texts: dict[str, int] = {}

        def place(text: str) -> int:
            return texts.setdefault(text, len(texts))

        def answer(prediction: Mapping) -> list:
            state = RIGHT if prediction["correct"] else WRONG
            if prediction["answer"] is None:
                state = UNPARSEABLE
            confidence = confidence_of(prediction)
            output = _cut(prediction["output"])
            read = prediction["answer"]
            return [
                place(output),
                state,
                None if confidence is None else round(confidence, 4),
                place(read) if read is not None and read != output else None,
            ]

        ranked, total = [], 0
        for task, entry in entries(report):
            name = entry["run"]
            run = self.runs[name]
            diagnoses = {record.case_id: record.diagnosis for record in run.held_out}
            sites = _sites(run)
            flagged = set((entry.get("details") or {}).get("high_rouge_wrong") or ())
            original = {p["case_id"]: p for p in run.predictions["original"][task]}
            tuned = self._predictions(name, task)
            total += len(tuned)
            order = sorted(
                tuned.values(),
                key=lambda p: (
                    p["case_id"] not in flagged, p["correct"], -p["rouge1"], str(p["case_id"])
                ),
            )  # fmt: skip
            for number, prediction in enumerate(order[:MOST_CASES]):
                case = prediction["case_id"]
                flag = case in flagged
                case_row = [
                    report["runs"].index(name),
                    tasks.index(task),
                    str(case),
                    place(str(sites[case])) if case in sites else None,
                    place(diagnoses[case]) if case in diagnoses else None,
                    place(prediction["reference"]),
                    answer(original[case]),
                    answer(prediction),
                    round(float(prediction["rouge1"]), 3),
                    int(flag),
                ]
                ranked.append((not flag, prediction["correct"], number, len(ranked), case_row))
        ranked.sort(key=lambda item: item[:4])
        return {
            "runs": list(report["runs"]),
            "tasks": [TITLES[task] for task in tasks],
            "total": total,
            "texts": list(texts),
            "cases": [row for *_, row in ranked],
        }


def _sites(run: Run) -> dict[str, str]:
    """Case id -> site, where the cohort is at hand and tells it."""
    if run.cases is None or "site" not in run.cases.columns:
        return {}
    told = run.cases[["case_id", "site"]].dropna().astype(str)
    told = told[told["site"].str.strip() != ""]
    return dict(told.itertuples(index=False, name=None))


def explorer_section(data: Mapping) -> str:
    def choice(key: str, label: str, options: Iterable[tuple[object, str]]) -> str:
        listed = "".join(f'<option value="{escape(v)}">{escape(t)}</option>' for v, t in options)
        return f'<label>{escape(label)} <select id="{key}">{listed}</select></label>'

    cases = data["cases"]
    places = sorted({row[3] for row in cases if row[3] is not None}, key=data["texts"].__getitem__)
    results = [
        ("", "Any"),
        ("tuned-right", "Tuned right"),
        ("tuned-wrong", "Tuned wrong"),
        ("tuned-unparseable", "Tuned unparseable"),
        ("only-tuned", "Only tuned right"),
        ("only-original", "Only original right"),
        ("both-wrong", "Both wrong"),
    ]
    if any(row[9] for row in cases):
        results.append(("close", "Right words, wrong dose, side or kind"))
    fields = []
    if len(data["runs"]) > 1:
        runs = [("", "All"), *enumerate(data["runs"])]
        fields.append(choice("by-run", "Run", runs))
    if len(data["tasks"]) > 1:
        fields.append(choice("by-task", "Task", [("", "All"), *enumerate(data["tasks"])]))
    fields.append(choice("by-result", "Result", results))
    if places:
        sites = [("", "All"), *((i, data["texts"][i].replace("_", " ")) for i in places)]
        fields.append(choice("by-site", "Site", sites))
    if any(row[7][2] is not None for row in cases):
        fields.append(
            '<label>Confidence from <input id="least" type="number" min="0" max="1" step="any" '
            'inputmode="decimal"></label><label>to <input id="most" type="number" min="0" max="1" '
            'step="any" inputmode="decimal"></label>'
        )
    fields.append('<label class="wide">Search <input id="words" type="search"></label>')
    fields.append('<button type="reset">Clear</button>')
    left = data["total"] - len(cases)
    note = (
        f"<p>{left:,} of {data['total']:,} cases are left out, right ones first, so that the page "
        "opens quickly; predictions.jsonl has them all.</p>"
        if left
        else ""
    )
    pager = (
        '<p class="pager"><button type="button" id="previous">Previous</button> '
        '<button type="button" id="next">Next</button></p>'
    )
    return (
        "<p>Regimens with the right words and a wrong dose, side or kind of treatment come first, "
        "then wrong answers, those nearest to the reference in wording at the top. Confidence is "
        "the tuned model's."
        f"</p>{note}<noscript><p>The list of cases needs scripts; predictions.jsonl has them."
        "</p></noscript>"
        f'<form id="filter" role="search" aria-label="Filter the cases">{"".join(fields)}</form>'
        '<p id="state" role="status"></p><ol id="list" class="cases"></ol>'
        f"{pager}"
        f'<script type="application/json" id="data">{embed_json(data)}</script>'
    )
