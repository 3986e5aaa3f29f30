"""Cohorts, run folders and runs in memory for the tests of the report; their texts are hostile."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd

from radonc_jax.data.cohort import load_records, write_cohort
from radonc_jax.evaluation import metrics, run
from radonc_jax.evaluation.run_folder import Run
from radonc_jax.tasks import TASKS, Record, select

NASTY = "<script>alert('x')</script> & \"L breast\""
# What would act if a page took it for markup; a line separator; a text that looks like a comment.
HOSTILE = (
    "</script><script>window.pwned = 1</script>"
    "<img src='https://images.example/a.png' onerror='window.pwned = 2'>"
    "<!-- \u2028 ]]> ${7 * 7} &lt;b&gt; <svg onload='window.pwned = 3'> L breast"
)


def make_cohort(folder):
    codes, labels = ["C61", "C50.911", "C20"], ["photon", "proton", "photon"]
    rows = [
        {
            "case_id": f"{split}-{i}",
            "patient_id": f"{split}-{i // 2}",
            "diagnosis": f"{NASTY} variant {i % 9}",
            "regimen": f"{50 + i % 3} Gy in 25 fx to L breast",
            "modality": labels[i % 3],
            "icd10": codes[i % 3],
            "site": ["prostate", "<i>breast</i>", "rectum"][i % 3],
            "split": split,
        }
        for split, n in (("train", 30), ("validation", 6), ("test", 48))
        for i in range(n)
    ]
    excluded = pd.DataFrame(columns=["row", "reason"])
    write_cohort(folder, pd.DataFrame(rows), excluded, {"ceiling": {"icd": 0.93}})
    return folder


def make_run(workdir, cohort, task="icd", right=(0.3, 0.8), name="base/model"):
    """A run folder as the evaluation leaves it; the models are right in these shares of cases."""
    records = load_records(cohort, "test")
    for model, share in zip(run.MODELS, right, strict=True):
        rng = np.random.default_rng(3)

        def decode(current, diagnoses, share=share, rng=rng):
            return [
                SimpleNamespace(
                    text=current.answer(record) if rng.random() < share else f"{NASTY} wrong",
                    tokens=[],
                    logprob=-1.0,
                    finished=True,
                    gap=None,
                    trimmed=False,
                    label_logprobs=None,
                )
                for record in records
            ]

        run.evaluate(
            decode,
            records,
            select(task),
            split="test",
            model=model,
            output=workdir / "evaluation" / "test" / model,
            bootstrap=50,
        )
    config = {"cohort": str(cohort), "model": name}
    (workdir / "config.json").write_text(json.dumps(config))
    (workdir / "manifest.json").write_text(json.dumps({"seed": 5}))
    return workdir


def run_in_memory(
    answers, task="regimen", *, logprobs=None, patients=None, name="run", sites=None
) -> Run:
    """A run of one task.

    Args:
      answers: (reference, original's output, tuned's output) of each case.
      logprobs: of the tuned model's answers.
      patients: of the cases; a patient each if None.
    """
    field = "icd10" if task == "icd" else task
    records = [
        Record(
            **{
                "case_id": f"case-{i}",
                "patient_id": patients[i] if patients else f"patient-{i}",
                "diagnosis": f"{HOSTILE} number {i}",
                "regimen": "50 Gy in 25 fx to L breast",
                "modality": "photon",
                "icd10": "C61",
                field: reference,
            }
        )
        for i, (reference, _, _) in enumerate(answers)
    ]
    predictions, scores = {}, {}
    for place, model in enumerate(run.MODELS, 1):
        judged = [
            metrics.judge(
                TASKS[task],
                record,
                answer[place],
                logprob=logprobs[i] if logprobs else -0.5 - i % 7,
            )
            for i, (record, answer) in enumerate(zip(records, answers, strict=True))
        ]
        predictions[model] = {task: judged}
        scores[model] = {
            task: metrics.score(judged, TASKS[task], split="test", model=model, bootstrap=20)
        }
    cases = pd.DataFrame([vars(record) for record in records])
    if sites is not None:
        cases["site"] = sites
    return Run(
        name=name,
        split="test",
        predictions=predictions,
        metrics=scores,
        provenance={"model": "base", "manifest": {}},
        held_out=records,
        cases=cases,
    )
