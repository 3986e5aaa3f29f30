"""`evaluate` with what goes beyond one pass over a split: changed texts, examples in the prompt."""

import hashlib
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, command_environment, run_command

from radonc_jax.data import cohort
from radonc_jax.evaluation import robustness, run
from radonc_jax.tasks import TASKS, WithExamples, choose_examples

# The command several times in one process, which saves its imports: a list of flags each.
SEVERAL = """
import json, sys
from absl import flags
from radonc_jax import command, evaluate

for arguments in json.loads(sys.argv[1]):
    flags.FLAGS.unparse_flags()
    flags.FLAGS(["evaluate", *arguments])
    command.guard(evaluate.main)(["evaluate"])
"""


@pytest.fixture(scope="module")
def evaluated(workspace, tmp_path_factory):
    """A run that has learned to name a modality, answering every way there is; and what it said."""
    workdir = tmp_path_factory.mktemp("evaluated") / "run"
    run_command(
        "train",
        *workspace.arguments,
        "--config.task=modality",
        "--config.train.steps=40",
        "--config.batch.examples=32",
        "--config.batch.sequence_length=256",  # changed texts are answered where they fit
        "--config.optimizer.learning_rate=0.02",
        "--config.final_evaluation=False",
        f"--workdir={workdir}",
    )
    calls = [
        ["--robustness"],
        ["--model=original", "--robustness"],
        ["--model=original", "--examples=2"],
        ["--examples=2"],
    ]
    arguments = [[f"--workdir={workdir}", *flags] for flags in calls]
    result = subprocess.run(
        [sys.executable, "-c", SEVERAL, json.dumps(arguments)],
        cwd=ROOT,
        env=command_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    return workdir, result


@pytest.mark.slow
def test_robustness_is_measured_written_and_reported(evaluated, workspace):
    workdir, result = evaluated
    folder = workdir / "evaluation" / "test"
    records = cohort.load_records(workspace.cohort, "test")
    answers = run.read_predictions(folder / "tuned" / run.PREDICTIONS)["modality"]
    readable = [p["case_id"] for p in answers if p["answer"] is not None]
    assert len(readable) > 10
    written = json.loads((folder / "tuned" / "robustness.json").read_text())
    predictions = (folder / "tuned" / run.PREDICTIONS).read_bytes()
    assert written.pop("predictions_sha256") == hashlib.sha256(predictions).hexdigest()
    found = written["modality"]
    texts = [r.diagnosis for r in records if r.case_id in readable]
    assert "side_flip" not in found  # a modality may hang on the side
    for name in robustness.asked_of("modality"):
        change = robustness.PERTURBATIONS[name]
        applies = sum(change(text, np.random.default_rng(0)) is not None for text in texts)
        assert found[name]["n"] + found[name]["left_out"] == applies > 0, name
        assert found[name]["expected"] == "same"
    assert found["irrelevant_sentence"]["n"] > 10
    lines = (folder / "tuned" / "robustness.jsonl").read_text().splitlines()
    cases = [json.loads(line) for line in lines]
    for name, entry in found.items():
        own = [case["as_expected"] for case in cases if case["perturbation"] == name]
        assert entry["n"] == len(own) and entry["rate"] == pytest.approx(np.mean(own))
        assert 0 <= entry["low"] <= entry["rate"] <= entry["high"] <= 1

    entry = json.loads((workdir / "report.json").read_text())["tasks"]["modality"]
    assert entry["robustness"]["tuned"] == found and entry["left_out"] == []
    # Random weights answer nothing that can be read, so nothing can be held against it.
    unread = entry["robustness"]["original"]["irrelevant_sentence"]
    assert (unread["n"], unread["rate"]) == (0, None)
    text = shown((workdir / "report.html").read_text())
    rate = found["irrelevant_sentence"]
    assert (
        f"Irrelevant sentence stay the same 0 &ndash; {rate['n']} {rate['rate']:.3f} "
        f"{rate['low']:.3f} to {rate['high']:.3f}" in text
    )
    assert f"irrelevant sentence {rate['rate']:.3f} of {rate['n']}" in result.stdout


@pytest.mark.slow
def test_answers_to_prompts_with_examples_stand_beside_the_others(evaluated, workspace):
    workdir, result = evaluated
    folder = workdir / "evaluation" / "test"
    plain, few = (
        run.read_predictions(folder / model / run.PREDICTIONS)["modality"]
        for model in ("original", "original_examples")
    )
    task = TASKS["modality"]
    training = cohort.load_records(workspace.cohort, "train")
    seed = json.loads((workdir / "config.json").read_text())["seed"]
    with_examples = WithExamples(task, choose_examples(task, training, 2, seed))
    records = cohort.load_records(workspace.cohort, "test")
    for asked, answers in ((task, plain), (with_examples, few)):
        assert [p["case_id"] for p in answers] == [r.case_id for r in records]
        for record, prediction in zip(records, answers, strict=True):
            prompt = asked.prompt(record.diagnosis).encode()
            assert prediction["prompt_sha256"] == hashlib.sha256(prompt).hexdigest()
    assert [p["output"] for p in plain] != [p["output"] for p in few]
    source = json.loads((folder / "original_examples" / run.SOURCE).read_text())
    assert (source["examples"], source["model"]) == (2, "original_examples")

    entry = json.loads((workdir / "report.json").read_text())["tasks"]["modality"]
    metrics = json.loads((folder / "original_examples" / run.METRICS).read_text())
    digest = hashlib.sha256((folder / "original_examples" / run.PREDICTIONS).read_bytes())
    assert metrics.pop("predictions_sha256") == digest.hexdigest()
    assert entry["variants"] == {"original_examples": metrics}
    assert metrics["accuracy"]["value"] == np.mean([p["correct"] for p in few])
    assert "Modality Original with 2 examples" in shown((workdir / "report.html").read_text())

    # The last call asked the tuned model with examples: one line, and nothing was written.
    assert result.returncode == 1
    told = result.stderr.strip().splitlines()[-1]
    assert told == "error: --examples are for --model=original, and without --robustness"
    assert not (folder / "tuned_examples").exists()


@pytest.mark.slow
def test_a_config_whose_training_cases_changed_is_told_to_prepare_again(workspace, tmp_path):
    """There is no run whose cohort could be put back."""
    folder = tmp_path / "cohort"
    shutil.copytree(workspace.cohort, folder)
    with (folder / "train.parquet").open("ab") as file:
        file.write(b"x")
    result = run_command(
        "evaluate",
        *workspace.arguments,
        f"--config.cohort={folder}",
        "--constrained=cohort",
        check=False,
    )
    assert result.returncode == 1
    told = result.stderr.strip().splitlines()[-1]
    assert "train.parquet: changed since prepare wrote it" in told
    assert told.endswith("run prepare again")


def shown(page):
    """The words of a page, without markup, style and data."""
    page = re.sub(r"<script.*?</script>", " ", page[page.index("</style>") :], flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))
