"""`evaluate` with what goes beyond one pass over a split: changed texts, examples in the prompt,
and everything at once."""

import hashlib
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, command_environment, run_command

from configs import common
from radonc_jax.data import cohort
from radonc_jax.evaluation import robustness, run
from radonc_jax.tasks import TASKS, WithExamples, choose_examples

TRAINED = (
    "--config.task=modality",
    "--config.train.steps=40",
    "--config.batch.examples=32",
    "--config.batch.sequence_length=256",  # changed texts are answered where they fit
    "--config.optimizer.learning_rate=0.02",
)

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

# The same, none of which ends the others; and, of each, what it told and how much it did.
COUNTED = """
import contextlib, io, json, sys
from absl import flags
from radonc_jax import command, evaluate, loading
from radonc_jax.decoding.text import TextDecoder

def counting(owner, name, number):
    real = getattr(owner, name)

    def counted(*arguments):
        done[name] += number(*arguments)
        return real(*arguments)

    setattr(owner, name, counted)

counting(loading, "load_base", lambda *_: 1)
counting(TextDecoder, "_run", lambda *arguments: len(arguments[-1]))
told = []
for arguments in json.loads(sys.argv[1]):
    flags.FLAGS.unparse_flags()
    flags.FLAGS(["evaluate", *arguments])
    done, error = {"load_base": 0, "_run": 0}, None
    with (
        contextlib.redirect_stdout(io.StringIO()) as stdout,
        contextlib.redirect_stderr(io.StringIO()) as stderr,
    ):
        try:
            command.guard(evaluate.main)(["evaluate"])
        except SystemExit as end:
            error = end.code
    told.append(
        {
            "stdout": stdout.getvalue(),
            "stderr": stderr.getvalue(),
            "error": error,
            "bases": done["load_base"],
            "asked": done["_run"],
        }
    )
print(json.dumps(told))
"""


def several(script, calls):
    """A script over calls of `evaluate`, a list of flags each, in one process."""
    return subprocess.run(
        [sys.executable, "-c", script, json.dumps(calls)],
        cwd=ROOT,
        env=command_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def evaluated(workspace, tmp_path_factory):
    """A run that has learned to name a modality, answering every way there is; and what it said."""
    workdir = tmp_path_factory.mktemp("evaluated") / "run"
    run_command(
        "train",
        *workspace.arguments,
        *TRAINED,
        "--config.final_evaluation=False",
        f"--workdir={workdir}",
    )
    calls = [
        ["--robustness"],
        ["--model=original", "--robustness"],
        ["--model=original", "--examples=2"],
        ["--examples=2"],
    ]
    return workdir, several(SEVERAL, [[f"--workdir={workdir}", *flags] for flags in calls])


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


EVERYTHING = [
    f"{split}/{name}" for split in ("test", "validation") for name in sorted(run.VARIANTS)
]


def answers_in(folder):
    """Part -> the bytes of its answers."""
    return {
        path.parent.relative_to(folder / "evaluation").as_posix(): path.read_bytes()
        for path in (folder / "evaluation").rglob(run.PREDICTIONS)
    }


@pytest.fixture(scope="module")
def everything(evaluated, tmp_path_factory):
    """A run that --all has asked everything, in three calls: in the first five examples are too
    long, the second has two, the third is the second again. Beside it one with single calls. Last
    five examples once more, by their own call. And what these calls told."""
    folder = tmp_path_factory.mktemp("everything")
    whole, single = folder / "whole", folder / "single"
    for copy in (whole, single):
        shutil.copytree(evaluated[0], copy, ignore=shutil.ignore_patterns("evaluation", "report.*"))
    calls = [
        (whole, "--all"),
        (whole, "--all", "--examples=2"),
        (whole, "--all", "--examples=2"),
        (single, "--constrained=cohort"),
        (single, "--split=validation"),
        (single, "--model=original", "--split=validation", "--constrained=cohort"),
        (whole, "--model=original", "--examples=5"),
    ]
    result = several(COUNTED, [[f"--workdir={workdir}", *flags] for workdir, *flags in calls])
    assert result.returncode == 0, result.stderr[-3000:]
    return whole, single, json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
def test_all_asks_everything_that_the_report_has_room_for(evaluated, everything):
    whole, single, told = everything
    answers = answers_in(whole)
    assert sorted(answers) == EVERYTHING
    # Every part answers as its own call does.
    alone = answers_in(evaluated[0]) | answers_in(single)
    assert len(alone) == 6
    assert {part: answers[part] for part in alone} == alone
    for model in run.MODELS:
        name = f"evaluation/test/{model}/robustness.json"
        assert (whole / name).read_bytes() == (evaluated[0] / name).read_bytes()

    entry = json.loads((whole / "report.json").read_text())["tasks"]["modality"]
    assert entry["left_out"] == []
    assert set(entry["variants"]) == set(run.VARIANTS) - set(run.MODELS)
    assert entry["variant_settings"]["original_examples"]["examples"] == 2
    assert entry["variant_settings"]["tuned_constrained"]["closed_set"] == "labels"
    assert set(entry["robustness"]) == set(run.MODELS)
    kinds = {name: found["conformal"]["kind"] for name, found in entry["confidence"].items()}
    assert kinds == {
        name: "labels" if name.endswith(run.CONSTRAINED) else "answer" for name in run.VARIANTS
    }
    assert f"report: {whole / 'report.html'}" in told[1]["stdout"]
    # The base is read once for both models; the single calls' is, too.
    assert [call["bases"] for call in told] == [1] * 7


@pytest.mark.slow
def test_a_part_that_cannot_be_asked_is_told_and_the_others_are_kept(everything):
    whole, _, told = everything
    first, second, third, *_, last = told
    parts = ["test/original_examples", "validation/original_examples"]
    lines = [line for line in first["stderr"].splitlines() if "prompts are too long" in line]
    assert [line.partition(": ")[0] for line in lines] == parts
    assert first["error"].startswith(
        f"error: 2 of 10 parts failed, each for the reason above: {', '.join(parts)}. "
    )
    # The other parts and the report are there all the same, and only what failed is asked again.
    assert f"report: {whole / 'report.html'}" in first["stdout"]
    answers = answers_in(whole)
    assert first["stdout"].count("answers and scores: ") == 8
    assert (second["error"], third["error"]) == (None, None)
    assert second["stdout"].count("answers and scores: ") == 10
    assert second["asked"] == sum(len(answers[part].splitlines()) for part in parts)
    assert first["asked"] > second["asked"] and third["asked"] == 0
    assert third["stdout"] == second["stdout"]
    # Asked by itself it is the call's error, and the answers to two examples are as they were.
    assert "prompts are too long" in last["error"] and last["asked"] == 0
    source = json.loads((whole / "evaluation/test/original_examples" / run.SOURCE).read_text())
    assert source["examples"] == 2


@pytest.mark.slow
def test_train_keeps_what_all_has_answered(everything, workspace):
    """Of the original model too, which both ask under an adapter that does nothing."""
    workdir = everything[0]
    config = json.loads((workdir / "config.json").read_text())
    assert config["final_evaluation"] is False
    (workdir / "config.json").write_text(json.dumps(config | {"final_evaluation": True}))
    files = sorted((workdir / "evaluation").rglob("*.json*"))
    before = [(path, path.stat().st_mtime_ns) for path in files]
    run_command("train", *workspace.arguments, *TRAINED, f"--workdir={workdir}")
    assert [(path, path.stat().st_mtime_ns) for path in files] == before


def test_what_goes_without_all_is_refused_before_anything_is_loaded(tmp_path):
    """The run folder is not even looked for."""
    config = ["--config=configs/tiny_modality.py"]
    run_folder = [f"--workdir={tmp_path / 'nowhere'}"]
    everything_asked = "it asks everything"
    text = tmp_path / "text"
    text.mkdir()
    of_text = common.get_config().to_dict() | {"task": "text", "final_evaluation": False}
    of_text["train"]["metric"] = "loss"
    (text / "config.json").write_text(json.dumps(of_text))
    cases = [
        (
            [*run_folder, "--all", "--model=original"],
            f"--all goes without --model: {everything_asked}",
        ),
        (
            [*run_folder, "--all", "--split=test", "--norobustness"],
            f"--all goes without --split and --robustness: {everything_asked}",
        ),
        (
            [*run_folder, "--all", "--output=answers"],
            "--output goes with --config: answers of a run lie in its folder",
        ),
        (
            [f"--workdir={text}", "--all"],
            'task="text" has no questions to answer, so there is nothing to evaluate',
        ),
        (
            [*config, "--all"],
            "--all, --examples and --robustness need the --workdir of a run",
        ),
        (
            ["--config=configs/tiny_regimen.py", "--constrained=table"],
            "task 'regimen' is answered in free text: leave --constrained out",
        ),
        (
            [*run_folder, "--constrained=table", "--robustness"],
            "--constrained goes without --examples and --robustness",
        ),
        (
            [*run_folder, "--constrained=table", "--examples=2", "--model=original"],
            "--constrained goes without --examples and --robustness",
        ),
        (
            [*run_folder, "--examples=2", "--robustness", "--model=original"],
            "--examples are for --model=original, and without --robustness",
        ),
    ]
    result = several(COUNTED, [arguments for arguments, _ in cases])
    assert result.returncode == 0, result.stderr[-3000:]
    for (_, expected), told in zip(cases, json.loads(result.stdout), strict=True):
        assert told["error"] == f"error: {expected}"
        assert (told["stdout"], told["bases"]) == ("", 0)


def test_all_leaves_out_closed_sets_of_free_text_and_takes_the_words_that_are_given():
    script = """
import json, sys
from configs import tiny_all, tiny_regimen
from radonc_jax import evaluate, settings

free, closed = (settings.from_mapping(c.get_config().to_dict()) for c in (tiny_regimen, tiny_all))
asked = [(free, "table", 5), (closed, "cohort", 0), (closed, "", 0)]
lists = [evaluate.all_parts(*arguments) for arguments in asked]
told = [[(p.split, p.name, p.constrained, p.examples) for p in parts] for parts in lists]
print(json.dumps(told))
"""
    result = several(script, [])
    told, found = result.stdout.splitlines()
    assert told == "task 'regimen' is answered in free text: closed sets are left out"
    free, cohorts, configs_own = json.loads(found)
    splits = ("test", "validation")
    assert free == [
        *[[split, model, "", 0] for model in ("tuned", "original") for split in splits],
        *[[split, "original_examples", "", 5] for split in splits],
    ]
    assert {name for _, name, _, _ in cohorts} == set(run.VARIANTS) - {"original_examples"}
    for parts, word in ((cohorts, "cohort"), (configs_own, "table")):
        assert {(name.endswith(run.CONSTRAINED), given) for _, name, given, _ in parts} == {
            (False, ""),
            (True, word),
        }


def shown(page):
    """The words of a page, without markup, style and data."""
    page = re.sub(r"<script.*?</script>", " ", page[page.index("</style>") :], flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))


# `evaluate_run` with parts that do nothing, or have an error. In a process of its own, as another
# command that the tests import has flags of the same names.
PARTS = """
import contextlib, io, json
from pathlib import Path
import jax
from configs import tiny_all
from radonc_jax import evaluate, settings

def answer(part, config, output):
    asked.append(part.split)
    if part.split in errors:
        raise errors[part.split]

evaluate.answer = answer
evaluate.prepare = lambda model, part, config: part
evaluate.report = lambda *_: reports.append(len(asked))
evaluate.check_closed_sets = lambda *_: None
evaluate.Model.of_run = lambda *_: None
evaluate.loading.find_cohort = lambda *_: "cohort"
evaluate.loading.run_mesh = lambda *_: None
config = settings.from_mapping(tiny_all.get_config().to_dict())

def ask(given, parts=3):
    global asked, reports, errors
    asked, reports, errors, told = [], [], given, io.StringIO()
    splits = [evaluate.Part(str(number), "tuned") for number in range(parts)]
    raised = None
    with contextlib.redirect_stderr(told):
        try:
            evaluate.evaluate_run(Path("run"), config, "best", splits)
        except Exception as error:
            raised = "its own" if error in given.values() else str(error)
    return asked, reports, raised, told.getvalue()

lack = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")
broken = jax.errors.JaxRuntimeError("INTERNAL: x")
found = [ask({"1": lack}), ask({"1": OSError("disk")}), ask({"1": broken}), ask({"0": lack}, 1)]
evaluate.parallel.several_processes = lambda: True
found += [ask({"1": lack}), ask({"1": evaluate.Unasked("too long")})]
print(json.dumps(found))
"""


def test_a_part_s_own_error_spares_the_others_and_any_other_leaves_a_report():
    result = several(PARTS, [])
    assert result.returncode == 0, result.stderr[-3000:]
    lack, disk, broken, alone, lack_of_several, unasked = json.loads(result.stdout)
    assert lack[:2] == [["0", "1", "2"], [3]]
    assert lack[2].startswith("1 of 3 parts failed, each for the reason above: 1/tuned.")
    assert lack[3] == "1/tuned: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes\n"
    # Of several processes one alone may have met it, so they end.
    for ended in (disk, broken, lack_of_several):
        assert ended == [["0", "1"], [2], "its own", ""]
    assert alone == [["0"], [], "its own", ""]
    assert unasked[:2] == [["0", "1", "2"], [3]] and unasked[2].startswith("1 of 3 parts failed")
