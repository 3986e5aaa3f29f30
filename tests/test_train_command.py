"""`train` as people run it: whole runs, killed runs, several processes, bad input."""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT, command_environment, run_command

SHORT = ("--config.train.steps=6", "--config.train.evaluate_every=3", "--config.train.save_every=1")


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
    assert not list(workdir.rglob("*.partial"))
    manifest = json.loads((workdir / "manifest.json").read_text())
    assert manifest["base_fingerprint_before"] == manifest["base_fingerprint_after"]
    assert set(manifest["base"]["sha256"]) >= {"config.json", "model.safetensors"}
    assert manifest["environment"]["versions"]["jax"]
    entry = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[0])
    assert {"step", "split", "loss", "tokens", "tokens_per_second"} <= set(entry)
    assert list((workdir / "tensorboard").glob("events*"))
    best = json.loads((workdir / "best.json").read_text())
    assert (workdir / "checkpoints" / str(best["step"])).is_dir()


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


@pytest.mark.slow
def test_evaluate_with_a_config_alone_asks_the_original(quiet, workspace, tmp_path):
    output = tmp_path / "original"
    result = run_command("evaluate", *workspace.arguments, f"--output={output}")
    assert result.stdout.startswith("icd: accuracy")
    expected = quiet[0] / "evaluation/test/original/predictions.jsonl"
    assert (output / "predictions.jsonl").read_bytes() == expected.read_bytes()


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


@pytest.mark.slow
def test_killed_and_started_again_it_ends_as_if_nothing_had_happened(quiet, workspace, tmp_path):
    expected = losses(quiet[0])
    workdir = tmp_path / "run"
    command = [sys.executable, "-m", "radonc_jax.train", *workspace.arguments, *SHORT]
    process = subprocess.Popen(
        [*command, f"--workdir={workdir}"],
        cwd=ROOT,
        env=command_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    # Killed in the middle: some steps are done, some are not.
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if (workdir / "metrics.jsonl").is_file() and (2, "train") in losses_or_none(workdir):
            break
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = losses_or_none(workdir)
    assert (2, "train") in before and (6, "train") not in before
    run_command("train", *workspace.arguments, *SHORT, f"--workdir={workdir}")
    assert losses(workdir) == expected  # bit for bit
    assert (workdir / "best.json").read_text() == (quiet[0] / "best.json").read_text()
    ours, theirs = (
        (folder / "evaluation/test/tuned/predictions.jsonl").read_bytes()
        for folder in (workdir, quiet[0])
    )
    assert ours == theirs


def losses_or_none(workdir):
    found = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        found[entry["step"], entry["split"]] = entry["loss"]
    return found


@pytest.mark.slow
def test_two_processes_give_the_trace_of_one(quiet, workspace, tmp_path):
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
                "--config.final_evaluation=False",
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


def test_a_run_is_not_resumed_on_another_cohort(quiet, workspace, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(quiet[0], workdir)
    manifest = json.loads((workdir / "manifest.json").read_text())
    manifest["cohort"]["manifest_sha256"] = "0" * 64
    (workdir / "manifest.json").write_text(json.dumps(manifest))
    for command in (["train", *workspace.arguments, *SHORT], ["evaluate"]):
        result = run_command(*command, f"--workdir={workdir}", check=False)
        assert result.returncode == 1 and "cohort" in last_line(result)
    assert json.loads((workdir / "manifest.json").read_text()) == manifest


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
    run_command("train", *workspace.arguments, *SHORT, f"--workdir={quiet[0]}")
    assert [(p, p.stat().st_mtime_ns) for p in files] == before


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
    assert result.returncode != 0 and "rnak" in result.stderr
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
    # Back to step 2, as if killed there: one bad validation is already counted.
    shutil.rmtree(workdir / "checkpoints" / "3")
    run_command("train", *arguments)
    assert losses(workdir) == expected


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
