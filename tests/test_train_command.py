"""`train` as people run it: whole runs, killed runs, several processes, bad input."""

import hashlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import ROOT, command_environment, run_command

import radonc_jax
from radonc_jax import loading
from radonc_jax.data import batches, cohort
from radonc_jax.evaluation import run as evaluation
from radonc_jax.models import huggingface
from radonc_jax.tasks import select
from radonc_jax.tasks.icd import is_leaf
from radonc_jax.training import checkpoint

SHORT = (
    "--config.train.steps=6",  # more than an epoch, which takes five
    "--config.train.evaluate_every=3",
    "--config.train.save_every=1",
    "--config.batch.examples=32",
    "--config.seed=3",
)


def losses(workdir):
    """{(step, split): loss} of a run; a step that stands twice is an error."""
    found = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        assert (entry["step"], entry["split"]) not in found
        found[entry["step"], entry["split"]] = entry["loss"]
    return found


@pytest.fixture(scope="module")
def quiet(workspace, tmp_path_factory):
    """An uninterrupted run, with its evaluation."""
    workdir = tmp_path_factory.mktemp("quiet") / "run"
    result = run_command("train", *workspace.arguments, *SHORT, f"--workdir={workdir}")
    return workdir, result


def test_a_run_leaves_what_the_contract_names(quiet, workspace):
    workdir, _ = quiet
    for name in ("config.json", "manifest.json", "metrics.jsonl", "best.json", "report.json"):
        assert (workdir / name).is_file(), name
    for model in ("original", "tuned"):
        folder = workdir / "evaluation" / "test" / model
        lines = [json.loads(x) for x in (folder / "predictions.jsonl").read_text().splitlines()]
        metrics = json.loads((folder / "metrics.json").read_text())
        assert len(lines) == metrics["n"] > 10
        fields = (
            "case_id task prompt_sha256 output answer reference correct rouge1 logprob finished"
        )
        assert set(fields.split()) <= set(lines[0])
    # The small configs ask for answers from closed sets as well, which lie apart.
    for model in ("original_constrained", "tuned_constrained"):
        path = workdir / "evaluation" / "test" / model / "predictions.jsonl"
        (answers,) = evaluation.read_predictions(path).values()
        assert all(is_leaf(line["answer"]) and line["finished"] for line in answers)
        assert len(answers) == len(lines)
    assert not list(workdir.rglob("*.partial")) + list(workdir.rglob(".answers.jsonl"))
    manifest = json.loads((workdir / "manifest.json").read_text())
    assert manifest["base_fingerprint_before"] == manifest["base_fingerprint_after"]
    assert manifest["base"]["sha256"].keys() >= {"config.json", "model.safetensors"}
    written = json.loads((workspace.model / "config.json").read_text())
    assert manifest["architecture"] == {
        "name": written["architectures"][0],
        "layers": written["num_hidden_layers"],
        "parameters": manifest["parameters"]["frozen"],
    }
    hashes = {workspace.model / name: value for name, value in manifest["base"]["sha256"].items()}
    hashes[workspace.cohort / "manifest.json"] = manifest["cohort"]["manifest_sha256"]
    for path, value in hashes.items():
        assert value == hashlib.sha256(path.read_bytes()).hexdigest()
    assert manifest["environment"]["versions"]["jax"]
    entries = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert {"step", "split", "loss", "tokens", "tokens_per_second"} <= set(entries[0])
    # The first five steps are an epoch; padding is no token of an example.
    config = loading.read_settings(workdir)
    tokenizer = huggingface.load_tokenizer(workspace.model)
    records = cohort.load_records(workspace.cohort, "train")
    examples, _ = batches.task_examples(records, select("icd"), tokenizer, config.batch)
    trained = [entry["tokens"] for entry in entries if entry["split"] == "train"]
    assert 4 * 32 < len(examples) <= 5 * 32 and len(trained) == 6
    assert sum(trained[:5]) == sum(example.length for example in examples)
    rates = [entry["learning_rate"] for entry in entries if entry["split"] == "train"]
    # Six steps are too few for a warm-up: half a cosine from 2e-3 down.
    expected = [1e-3 * (1 + math.cos(math.pi * number / 6)) for number in range(6)]
    assert rates == pytest.approx(expected, rel=1e-5)
    assert list((workdir / "tensorboard").glob("events*"))
    best = json.loads((workdir / "best.json").read_text())
    folder = workdir / "checkpoints" / str(best["step"])
    assert folder.is_dir()
    # Adapters alone are saved: not one array of the base, and not its bytes.
    with ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.metadata(folder / "trainable").item_metadata.tree
    assert saved and all(name.endswith(("_proj.a", "_proj.b")) for name in saved)
    shapes = [array.shape for array in saved.values()]
    assert sum(map(math.prod, shapes)) == manifest["parameters"]["trainable"]
    assert all(4 in shape for shape in shapes)  # the rank


def test_a_run_ends_with_its_scores_and_the_place_of_its_report(quiet):
    workdir, result = quiet
    entry = json.loads((workdir / "report.json").read_text())["tasks"]["icd"]
    original, tuned = (entry[model]["accuracy"]["value"] for model in ("original", "tuned"))
    scores, place = result.stdout.splitlines()[-2:]
    told = f"icd: accuracy {original:.3f} original, {tuned:.3f} tuned, n {entry['tuned']['n']}, "
    assert scores.startswith(told)
    assert place == f"report: {workdir / 'report.html'}"


def mean_loss(lm, examples):
    """Cross-entropy of a notebook's model over the answers of examples, each in its own row."""
    width = max(len(example.prompt) + len(example.answer) for example in examples)
    tokens, answers = np.zeros((2, len(examples), width), np.int32)
    for row, example in enumerate(examples):
        start, stop = len(example.prompt), len(example.prompt) + len(example.answer)
        tokens[row, :stop] = (*example.prompt, *example.answer)
        answers[row, start:stop] = 1
    logits = jax.nn.log_softmax(lm.logits(tokens))[:, :-1]
    chosen = np.take_along_axis(np.asarray(logits), tokens[:, 1:, None], axis=-1)[..., 0]
    return -(chosen * answers[:, 1:]).sum() / answers.sum()


def test_logged_losses_are_those_of_the_models_on_their_cases(quiet, workspace):
    workdir, logged = quiet[0], losses(quiet[0])
    config = loading.read_settings(workdir)
    original = radonc_jax.load(str(workspace.model), dtype="float32")
    tuned = radonc_jax.load(str(workspace.model), adapter=str(workdir), dtype="float32")
    records = {split: cohort.load_records(workspace.cohort, split) for split in cohort.SPLITS}
    examples = {
        split: batches.task_examples(records[split], select("icd"), tuned.tokenizer, config.batch)[
            0
        ]
        for split in ("train", "validation")
    }
    # The first step sees the untouched base, the best checkpoint is that of the first validation.
    order = batches.Batches(
        examples["train"], config.batch, epochs=2, seed=config.seed, row_multiple=1
    )
    seen = set(order.case_ids(0))
    first = [example for example in examples["train"] if example.case_id in seen]
    assert logged[1, "train"] == pytest.approx(mean_loss(original, first), rel=1e-5)
    best = json.loads((workdir / "best.json").read_text())["step"]
    expected = mean_loss(tuned, examples["validation"])
    assert logged[best, "validation"] == pytest.approx(expected, rel=1e-5)
    assert abs(expected - mean_loss(original, examples["validation"])) > 1e-3


@pytest.mark.slow
def test_a_merged_export_tells_what_merging_costs(quiet, tmp_path):
    workdir, _ = quiet
    output = tmp_path / "merged"
    arguments = (f"--workdir={workdir}", "--format=merged", f"--output={output}")
    result = run_command("export", *arguments, "--check_cases=7")
    report = json.loads((output / "export.json").read_text())
    validation = report["validation"]
    assert (validation["cases"], validation["answers"]) == (7, 7)
    assert validation["identical"] == 1.0
    # In float32 nothing is rounded away, but the two sums are not taken in one order.
    assert 0 < validation["largest_logit_difference"] < 1e-4
    assert report["rounding"]["share_of_update"] == 0
    assert "100.0% of 7 answers" in result.stdout
    assert set(report["base"]["sha256"]) >= {"config.json", "model.safetensors"}
    assert not list(tmp_path.glob("*unchecked*"))


@pytest.mark.slow
def test_evaluate_answers_as_the_run_itself_did(quiet, workspace, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(quiet[0], workdir)
    shutil.rmtree(workdir / "evaluation")
    (workdir / "report.json").unlink()
    run_command("evaluate", f"--workdir={workdir}")
    assert not (workdir / "report.json").exists()  # one model alone is no comparison
    run_command("evaluate", f"--workdir={workdir}", "--model=original")
    for model in ("original", "tuned"):
        ours, theirs = (
            folder / "evaluation" / "test" / model / "predictions.jsonl"
            for folder in (workdir, quiet[0])
        )
        assert ours.read_bytes() == theirs.read_bytes()
    ours, theirs = (json.loads((f / "report.json").read_text()) for f in (workdir, quiet[0]))
    assert ours["tasks"]["icd"]["tests"] == theirs["tasks"]["icd"]["tests"]
    source = json.loads((workdir / "evaluation/test/tuned/source.json").read_text())
    manifest = json.loads((quiet[0] / "manifest.json").read_text())
    assert source["step"] == manifest["best_step"]
    assert source["trained_fingerprint"] == manifest["trained_fingerprint"]
    # What answers are kept under: `train`'s own and `evaluate`'s are alike.
    theirs = json.loads((quiet[0] / "evaluation/test/tuned/source.json").read_text())
    assert source["answers"] == theirs["answers"]
    config = json.loads((workdir / "config.json").read_text())
    assert source["answers"]["trained_prompt"] == config["batch"]["sequence_length"] - 1
    assert source["answers"]["lora"]["alpha"] == config["lora"]["alpha"]
    assert source["answers"]["architecture"] == source["architecture"]
    assert source["beyond_training"] == {"icd": 0}


@pytest.mark.slow
def test_a_run_folder_and_the_base_are_enough_on_another_machine(quiet, workspace, tmp_path):
    """What the settings name is not there: the cohort's copy and --base stand in."""
    workdir, base = tmp_path / "run", tmp_path / "base"
    shutil.copytree(quiet[0], workdir)
    shutil.copytree(workspace.model, base)
    shutil.rmtree(workdir / "evaluation")
    for name in ("excluded.csv", "deid_audit.jsonl"):  # not needed, and older copies lack them
        (workdir / "cohort" / name).unlink()
    config = json.loads((workdir / "config.json").read_text())
    config |= {"cohort": "/nowhere/cohort", "model": "/nowhere/model"}
    (workdir / "config.json").write_text(json.dumps(config))
    for model in ("original", "tuned"):
        result = run_command(
            "evaluate", f"--workdir={workdir}", f"--base={base}", f"--model={model}"
        )
        ours, theirs = (
            folder / "evaluation" / "test" / model / "predictions.jsonl"
            for folder in (workdir, quiet[0])
        )
        assert ours.read_bytes() == theirs.read_bytes()
    # With both models' answers there is a report, told as `train` tells it.
    assert result.stdout.splitlines()[-2:] == [
        line.replace(str(quiet[0]), str(workdir)) for line in quiet[1].stdout.splitlines()[-2:]
    ]
    ours, theirs = (json.loads((f / "report.json").read_text()) for f in (workdir, quiet[0]))
    for name in ("tests", "baselines", "tuned"):
        assert ours["tasks"]["icd"][name] == theirs["tasks"]["icd"][name]
    # Another base, or another cohort in the copy's place, is refused.
    path = base / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    result = run_command("evaluate", f"--workdir={workdir}", f"--base={base}", check=False)
    assert result.returncode == 1 and "fingerprint of the weights" in last_line(result)
    (workdir / "cohort" / "manifest.json").write_text("{}")
    result = run_command("evaluate", f"--workdir={workdir}", check=False)
    assert result.returncode == 1 and "(cohort differ" in last_line(result)


@pytest.mark.slow
def test_evaluate_with_a_config_alone_asks_the_original(quiet, workspace, tmp_path):
    output = tmp_path / "original"
    result = run_command("evaluate", *workspace.arguments, f"--output={output}")
    assert result.stdout.startswith("icd: accuracy")
    expected = quiet[0] / "evaluation/test/original/predictions.jsonl"
    assert (output / "predictions.jsonl").read_bytes() == expected.read_bytes()
    # Another split in the same folder is another question, not the answers that lie there.
    run_command("evaluate", *workspace.arguments, f"--output={output}", "--split=validation")
    metrics = json.loads((output / "metrics.json").read_text())
    lines = (output / "predictions.jsonl").read_text().splitlines()
    asked = cohort.load_records(workspace.cohort, "validation")
    assert metrics["split"] == "validation" and metrics["n"] == len(asked)
    assert [json.loads(line)["case_id"] for line in lines] == [case.case_id for case in asked]


def test_evaluate_without_a_run_says_what_is_missing(tmp_path):
    result = run_command("evaluate", f"--workdir={tmp_path}", check=False)
    assert result.returncode == 1 and "config.json" in last_line(result)


def test_no_clinical_text_in_logs_and_metrics(quiet, workspace):
    workdir, result = quiet
    import pandas as pd

    words = {
        word
        for split in ("train", "validation", "test")
        for text in pd.read_parquet(workspace.cohort / f"{split}.parquet")["diagnosis"]
        for word in text.split()
        if word.isalpha() and len(word) > 9
    }
    words -= {"validation", "parameters"}
    told = result.stdout + result.stderr
    for path in ("metrics.jsonl", "manifest.json", "config.json", "best.json"):
        told += (workdir / path).read_text()
    assert words and not [word for word in words if word in told]


def losses_or_none(workdir):
    found = {}
    if not (workdir / "metrics.jsonl").is_file():
        return found
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        found[entry["step"], entry["split"]] = entry["loss"]
    return found


@pytest.mark.slow
def test_two_processes_give_the_trace_the_answers_and_the_report_of_one(quiet, workspace, tmp_path):
    expected = losses(quiet[0])
    workdir = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [
                "bash",
                "launch/multi_gpu.sh",
                *workspace.arguments,
                *SHORT,
                "--config.mesh.fsdp=2",
                f"--workdir={workdir}",
            ],
            cwd=ROOT,
            env=command_environment()
            | {
                "PYTHON": sys.executable,
                "COORDINATOR": f"127.0.0.1:{port}",
                "NUM_HOSTS": "2",
                "HOST_INDEX": str(index),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs[0][-3000:]
    got = losses(workdir)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key] == pytest.approx(value, rel=1e-5), key
    assert [output.count("report: ") for output in outputs] == [1, 0]
    for model in ("original", "tuned"):
        ours, theirs = (
            [json.loads(line) for line in path.read_text().splitlines()]
            for path in (
                folder / "evaluation" / "test" / model / "predictions.jsonl"
                for folder in (workdir, quiet[0])
            )
        )
        fields = ("case_id", "output", "answer", "finished", "correct", "rouge1")
        assert [[x[name] for name in fields] for x in ours] == [
            [x[name] for name in fields] for x in theirs
        ]
        assert [x["logprob"] for x in ours] == pytest.approx(
            [x["logprob"] for x in theirs], rel=1e-4
        )
    ours, theirs = (json.loads((f / "report.json").read_text()) for f in (workdir, quiet[0]))
    assert ours["tasks"]["icd"]["tests"] == theirs["tasks"]["icd"]["tests"]
    assert (workdir / "report.html").stat().st_size > 10_000
    assert not list(workdir.rglob("*.part*"))


def test_a_run_folder_of_another_config_is_refused(quiet, workspace):
    before = sorted((p, p.stat().st_mtime_ns) for p in quiet[0].rglob("*"))
    result = run_command(
        "train",
        *workspace.arguments,
        *SHORT,
        "--config.lora.alpha=7.0",
        f"--workdir={quiet[0]}",
        check=False,
    )
    assert result.returncode == 1
    assert "lora.alpha" in last_line(result)
    assert sorted((p, p.stat().st_mtime_ns) for p in quiet[0].rglob("*")) == before


def test_a_run_is_not_resumed_on_another_cohort_or_base(quiet, workspace, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(quiet[0], workdir)
    manifest = json.loads((workdir / "manifest.json").read_text())
    manifest["cohort"]["manifest_sha256"] = "0" * 64
    manifest["base"]["sha256"]["model.safetensors"] = "0" * 64
    manifest["base_fingerprint_before"] = "0" * 8
    (workdir / "manifest.json").write_text(json.dumps(manifest))
    named = ("base: model.safetensors", "base_fingerprint_before", "cohort")
    train = ["train", *workspace.arguments, *SHORT]
    for command, keys in ((train, named), (["evaluate"], ["cohort"])):
        result = run_command(*command, f"--workdir={workdir}", check=False)
        assert result.returncode == 1 and f"({', '.join(keys)} differ" in last_line(result)
    assert json.loads((workdir / "manifest.json").read_text()) == manifest
    with pytest.raises(ValueError, match="another base than .* fingerprint of the weights"):
        loading.load_run(workdir)


def test_an_adapter_that_left_the_numbers_is_not_saved(workspace, tmp_path):
    workdir = tmp_path / "run"
    result = run_command(
        "train",
        *workspace.arguments,
        "--config.train.steps=4",
        "--config.train.save_every=1",
        "--config.optimizer.learning_rate=1e38",
        f"--workdir={workdir}",
        check=False,
    )
    assert result.returncode == 1
    assert last_line(result).startswith("error: step 1: norm of the trained arrays inf; ")
    assert not list((workdir / "checkpoints").iterdir())
    assert losses(workdir).keys() == {(1, "train")}


# `train`, with a number that is none in the loss or the gradient of step 5, or in a validation.
NOT_FINITE = """
import sys
import numpy as np
from radonc_jax import command, train
from radonc_jax.data.batches import Batches
from radonc_jax.training import step

where = sys.argv.pop(1)
begin, get, jit_train_step = Batches.__init__, Batches.__getitem__, step.jit_train_step

def begin_noting(self, *arguments, seed, **options):
    self.validates = seed is None
    begin(self, *arguments, seed=seed, **options)

def get_spoilt(self, number):
    batch = get(self, number)
    if (self.validates, number) == {"loss": (False, 4), "validation": (True, 0)}.get(where):
        batch["weights"] = batch["weights"] * np.float32("nan")
    return batch

def jit_spoilt(*arguments):
    run = jit_train_step(*arguments)
    def spoilt(state, base, batch):
        last = int(state.step) == 4
        state, metrics = run(state, base, batch)
        return state, metrics | ({"gradient_norm": np.float32("inf")} if last else {})
    return spoilt

Batches.__init__, Batches.__getitem__ = begin_noting, get_spoilt
if where == "gradient":
    step.jit_train_step = jit_spoilt
command.run(train.main)
"""


@pytest.mark.slow
def test_a_number_that_is_none_stops_the_run_and_its_last_checkpoint_goes_on(
    quiet, workspace, tmp_path
):
    workdir = tmp_path / "run"
    arguments = [*workspace.arguments, *SHORT, "--config.final_evaluation=False"]
    expected = losses(quiet[0])
    config = loading.read_settings(quiet[0])
    tokenizer = radonc_jax.load(str(workspace.model), dtype="float32").tokenizer
    train, validation = (
        batches.task_examples(
            cohort.load_records(workspace.cohort, split), select("icd"), tokenizer, config.batch
        )[0]
        for split in ("train", "validation")
    )
    order = batches.Batches(train, config.batch, epochs=2, seed=config.seed, row_multiple=1)
    for where, step, what, cases in (
        ("validation", 3, "validation loss nan", [example.case_id for example in validation]),
        ("loss", 5, "loss nan, gradient norm nan", order.case_ids(4)),
        ("gradient", 5, f"loss {expected[5, 'train']}, gradient norm inf", order.case_ids(4)),
    ):
        result = subprocess.run(
            [sys.executable, "-c", NOT_FINITE, where, *arguments, f"--workdir={workdir}"],
            cwd=ROOT,
            env=command_environment(),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 1
        path = workdir / "not_finite.json"
        told = f"error: step {step}: {what}; the ids of its {len(cases)} cases are in {path}. "
        assert last_line(result).startswith(told)
        content = json.loads(path.read_text())
        assert (content["step"], content["what"]) == (step, what)
        assert len(cases) > 8 and sorted(content["cases"]) == sorted(cases)
    # Steps 3, which was saved before its validation, and 4 have been restored so far.
    result = run_command("train", *arguments, f"--workdir={workdir}")
    assert "resumed at step 4 of 6" in result.stdout
    assert losses(workdir) == expected


# `train`, with a fingerprint that tells of another base when it is taken for the second time.
CHANGED_BASE = """
from radonc_jax import command, train
from radonc_jax.training import step

real, seen = step.fingerprint, []

def fingerprint(tree, *like):
    seen.append(real(tree, *like))
    return seen[-1] + ("changed" if seen.count(seen[-1]) > 1 else "")

step.fingerprint = fingerprint
command.run(train.main)
"""


def test_a_base_that_changed_while_training_makes_the_run_void(quiet, workspace, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(quiet[0], workdir)
    shutil.rmtree(workdir / "evaluation")
    result = subprocess.run(
        [sys.executable, "-c", CHANGED_BASE, *workspace.arguments, *SHORT, f"--workdir={workdir}"],
        cwd=ROOT,
        env=command_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 1 and "frozen base changed" in last_line(result)
    assert not (workdir / "evaluation").exists()


@pytest.mark.long
@pytest.mark.slow
def test_a_run_starts_from_a_given_adapter(quiet, workspace, tmp_path):
    """At a rate that rounds away, the run ends where the given adapter is."""
    given, workdir = tmp_path / "given", tmp_path / "run"
    shutil.copytree(quiet[0], given)
    arguments = (
        *workspace.arguments,
        "--config.train.steps=1",
        "--config.optimizer.learning_rate=1e-30",
        f"--config.lora.init_from={given}",
        f"--workdir={workdir}",
    )
    run_command("train", *arguments)
    best = json.loads((given / "best.json").read_text())["step"]
    expected = losses(given)[best, "validation"]
    assert losses(workdir)[1, "validation"] == pytest.approx(expected, rel=1e-6)
    manifest = json.loads((workdir / "manifest.json").read_text())
    fingerprint = json.loads((given / "manifest.json").read_text())["trained_fingerprint"]
    assert manifest["trained_fingerprint"] == fingerprint
    # The original is the base, not the given adapter; the tuned answers as that one did.
    for model in ("original", "tuned"):
        ours, theirs = (
            (folder / "evaluation/test" / model / "predictions.jsonl").read_bytes()
            for folder in (workdir, given)
        )
        assert ours == theirs
    hashes = manifest["init_from"]["sha256"]
    assert manifest["init_from"]["step"] == best and hashes
    assert all(len(value) == 64 and (given / name).is_file() for name, value in hashes.items())

    # Resumed with the adapter changed since, it stops.
    with open(given / next(iter(hashes)), "ab") as file:
        file.write(b" ")
    shutil.rmtree(workdir / "evaluation")
    result = run_command("train", *arguments, check=False)
    assert result.returncode == 1 and "init_from" in last_line(result)


def test_a_finished_run_answers_nothing_again(quiet, workspace):
    files = sorted((quiet[0] / "evaluation").rglob("*.json*"))
    before = [(p, p.stat().st_mtime_ns) for p in files]
    # Killed after the answers were whole, but before their journal was deleted.
    journal = quiet[0] / "evaluation/test/tuned/.answers.jsonl"
    journal.write_text("{}\n")
    run_command("train", *workspace.arguments, *SHORT, f"--workdir={quiet[0]}")
    assert [(p, p.stat().st_mtime_ns) for p in files] == before
    assert not journal.exists()


def last_line(result):
    assert "Traceback" not in result.stderr, result.stderr[-2000:]
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ")
    return line


def damaged(workspace, tmp_path, part):
    """A copy of the model or cohort to be damaged by a test."""
    target = tmp_path / part
    shutil.copytree(workspace.folder / part, target)
    return target


def truncate(workspace, tmp_path):
    model = damaged(workspace, tmp_path, "model")
    path = model / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)
    return f"--config.model={model}"


def other_family(workspace, tmp_path):
    model = damaged(workspace, tmp_path, "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    return f"--config.model={model}"


def other_shape(workspace, tmp_path):
    model = damaged(workspace, tmp_path, "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    return f"--config.model={model}"


def no_weights(workspace, tmp_path):
    model = damaged(workspace, tmp_path, "model")
    (model / "model.safetensors").unlink()
    return f"--config.model={model}"


def missing_column(workspace, tmp_path):
    import pandas as pd

    folder = damaged(workspace, tmp_path, "cohort")
    table = pd.read_parquet(folder / "train.parquet").drop(columns="modality")
    table.to_parquet(folder / "train.parquet")
    return f"--config.cohort={folder}"


def empty_split(workspace, tmp_path):
    import pandas as pd

    folder = damaged(workspace, tmp_path, "cohort")
    pd.read_parquet(folder / "validation.parquet").iloc[:0].to_parquet(
        folder / "validation.parquet"
    )
    return f"--config.cohort={folder}"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncate, "model.safetensors"),
        (other_family, "gpt2"),
        (other_shape, "up_proj.*shape"),
        (no_weights, "model.safetensors"),
        (missing_column, "modality|manifest"),
        (empty_split, "validation"),
        (lambda *_: "--config.task=prognosis", "prognosis"),
        (lambda *_: "--config.lora.targets=('q_proj','x_proj')", "x_proj"),
        (lambda *_: "--config.lora.init_from=/nowhere/adapter", "init_from.*/nowhere/adapter"),
        (lambda *_: "--config.mesh.data=3", "3 devices"),
        (lambda *_: "--config.model=/nowhere/model", "/nowhere/model"),
        (lambda *_: "--config.cohort=/nowhere/cohort", "/nowhere/cohort"),
        (lambda *_: "--config.decode.max_new_tokens=3", "max_new_tokens"),
        (lambda *_: "--config.decode.max_new_tokens=510", "too long"),
        (lambda *_: "--config.batch.sequence_length=8", "sequence_length=8"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_bad_input_stops_before_training_and_leaves_nothing(spoil, message, workspace, tmp_path):
    workdir = tmp_path / "run"
    arguments = [*workspace.arguments, *SHORT]
    result = run_command(
        "train", *arguments, spoil(workspace, tmp_path), f"--workdir={workdir}", check=False
    )
    assert result.returncode == 1
    import re

    assert re.search(message, last_line(result))
    assert not workdir.exists()


def test_an_unknown_config_key_stops_at_once(workspace, tmp_path):
    result = run_command(
        "train",
        *workspace.arguments,
        "--config.lora.rnak=3",
        f"--workdir={tmp_path / 'run'}",
        check=False,
    )
    assert result.returncode == 1
    assert last_line(result).startswith("error: --config has no key 'rnak'. Did you mean \"rank\"")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_early_stopping_survives_a_restart(workspace, tmp_path):
    """Random weights answer nothing right: the first validation stays the best."""
    workdir = tmp_path / "run"
    arguments = (
        *workspace.arguments,
        "--config.train.steps=8",
        "--config.train.evaluate_every=1",
        "--config.train.patience=2",
        "--config.final_evaluation=False",
        f"--workdir={workdir}",
    )
    run_command("train", *arguments)
    expected = losses(workdir)
    assert {step for step, split in expected if split == "train"} == {1, 2, 3}
    assert json.loads((workdir / "best.json").read_text()) == {"step": 1, "value": 0.0}
    # Back to step 2, as if killed there: one bad validation is already counted. Of several
    # processes that are told in the validation that ends it, all end.
    shutil.rmtree(workdir / "checkpoints" / "3")
    result = subprocess.run(
        [sys.executable, "tests/told.py", "third validation", "several", *arguments],
        cwd=ROOT,
        env=command_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 75 and "told to end: all steps are saved" in result.stderr
    assert losses(workdir) == expected
    run_command("train", *arguments)
    assert losses(workdir) == expected
    # The best, which is not the newest, is lost: what then ends the run is told, and ends it.
    for path in (workdir / "checkpoints" / "1" / "trainable").rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)
    result = run_command("train", *arguments, check=False)
    assert result.returncode == 1 and "once " in last_line(result)
    shutil.move(workdir / "checkpoints" / "1", tmp_path / "lost")
    result = run_command("train", *arguments)
    assert "no checkpoint 1; it has [2, 3]; the last one is evaluated" in result.stderr
    assert json.loads((workdir / "manifest.json").read_text())["best_step"] == 3
    assert checkpoint.find_step(workdir, "best") == 3


@pytest.mark.slow
def test_the_best_step_by_loss_is_that_of_the_smallest_restarted_or_not(workspace, tmp_path):
    workdir = tmp_path / "run"
    arguments = (
        *workspace.arguments,
        "--config.train.evaluate_every=1",
        "--config.train.metric=loss",
        "--config.final_evaluation=False",
        f"--workdir={workdir}",
    )

    def best():
        return json.loads((workdir / "best.json").read_text())

    run_command("train", *arguments, "--config.train.steps=3")
    judged = {step: loss for (step, split), loss in losses(workdir).items() if split != "train"}
    assert best() == {"step": 3, "value": judged[3]} and judged[3] == min(judged.values())
    assert len(set(judged.values())) == len(judged) == 3
    # The step before the best, as if killed there: it is judged better again.
    shutil.rmtree(workdir / "checkpoints" / "3")
    run_command("train", *arguments, "--config.train.steps=3")
    assert best() == {"step": 3, "value": judged[3]}


@pytest.mark.slow
def test_the_accuracy_of_a_validation_is_that_of_its_answers(workspace, tmp_path):
    """A model that has learnt to answer "photon" is right in some of the cases."""
    workdir, asked = tmp_path / "run", 7
    run_command(
        "train",
        *workspace.arguments,
        "--config.task=modality",
        "--config.trainable=full",
        "--config.optimizer.learning_rate=3e-3",
        "--config.train.steps=12",
        f"--config.train.validation_cases={asked}",
        "--config.final_evaluation=False",
        f"--workdir={workdir}",
    )
    run_command("evaluate", f"--workdir={workdir}", "--split=validation")
    path = workdir / "evaluation/validation/tuned/predictions.jsonl"
    (answers,) = evaluation.read_predictions(path).values()
    right = [answer["correct"] for answer in answers]
    expected = sum(right[:asked]) / asked
    # Neither all cases nor those of another split have this accuracy.
    test = [case.modality == "photon" for case in cohort.load_records(workspace.cohort, "test")]
    assert expected not in (0, 1, sum(right) / len(right), sum(test[:asked]) / asked)
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["split"], last["step"]) == ("validation", 12)
    assert last["accuracy"] == pytest.approx(expected)
    best = json.loads((workdir / "best.json").read_text())
    assert best == {"step": 12, "value": last["accuracy"]}


# `train`, with these accuracies of its validations; null kills it instead.
SCORED = """
import json, os, signal, sys
from radonc_jax import command, train
from radonc_jax.evaluation import run

scores = json.loads(sys.argv.pop(1))

def evaluate(*_, split, **__):
    assert split == "validation"
    score = scores.pop(0)
    if score is None:
        os.kill(os.getpid(), signal.SIGKILL)
    others = dict.fromkeys(("rouge1", "f1_macro"), {"value": 1 - score})
    return {"task": "icd", "accuracy": {"value": score}} | others

run.evaluate = evaluate
command.run(train.main)
"""


@pytest.mark.long
def test_the_best_step_is_that_of_the_highest_accuracy_killed_or_not(workspace, tmp_path):
    workdir = tmp_path / "run"
    arguments = (
        *workspace.arguments,
        "--config.train.steps=3",
        "--config.train.evaluate_every=1",
        "--config.final_evaluation=False",
        f"--workdir={workdir}",
    )

    def scored(*scores):
        return subprocess.run(
            [sys.executable, "-c", SCORED, json.dumps(scores), *arguments],
            cwd=ROOT,
            env=command_environment(),
            capture_output=True,
            text=True,
            timeout=300,
        )

    result = scored(0.1, 0.3, None)
    assert result.returncode == -signal.SIGKILL, result.stderr[-2000:]
    # As if killed before step 3 was saved: the validation of step 2, which is not in its
    # checkpoint, was made and is not made again.
    shutil.rmtree(workdir / "checkpoints" / "3", ignore_errors=True)
    result = scored(0.2)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "resumed at step 2 of 3" in result.stdout
    assert json.loads((workdir / "best.json").read_text()) == {"step": 2, "value": 0.3}
    entries = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    logged = [(e["step"], e["accuracy"]) for e in entries if e["split"] == "validation"]
    assert logged == [(1, 0.1), (2, 0.3), (3, 0.2)]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        ("--config.task=all", "--config.lora.dora=True", "--config.lora.dropout=0.1"),
        ("--config.trainable=full", "--config.train.metric=loss"),
        ("--config.precision.base=nf4", "--config.precision.compute=bfloat16"),
    ],
    ids=["all, dora, dropout", "full", "nf4"],
)
def test_other_ways_to_train_run_to_their_report(changes, workspace, tmp_path):
    workdir = tmp_path / "run"
    run_command(
        "train",
        *workspace.arguments,
        "--config.train.steps=2",
        "--config.decode.max_new_tokens=60",
        *changes,
        f"--workdir={workdir}",
    )
    tasks = json.loads((workdir / "report.json").read_text())["tasks"]
    assert set(tasks) == ({"regimen", "modality", "icd"} if "task=all" in changes[0] else {"icd"})
    assert all(math.isfinite(loss) for loss in losses(workdir).values())
    if "nf4" not in changes[0]:
        return
    # Such a run goes on to answers and to other programs as any other does.
    run_command("evaluate", f"--workdir={workdir}", "--split=validation")
    output = tmp_path / "merged"
    arguments = (f"--workdir={workdir}", "--format=merged", f"--output={output}")
    run_command("export", *arguments, "--check_cases=20")
    validation = json.loads((output / "export.json").read_text())["validation"]
    assert (validation["base"], validation["merged_computed_as"]) == ("nf4", "bfloat16")
    # Four bits a weight are not sixteen: the comparison must show it.
    assert validation["identical"] < 1 and validation["largest_logit_difference"] > 0.01
