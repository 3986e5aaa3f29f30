"""Runs that are killed, told to end, damaged or out of room end as if nothing had happened.

`RADONC_KILLS` sets how often the run of the first test is killed (and, up to six times, that of the
second): a few times in CI, for its twenty minutes; twenty times with
RADONC_KILLS=20 launch/test.sh tests/test_faults.py
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import pandas as pd
import pytest
from conftest import ROOT, command_environment, run_command
from test_train_command import SHORT, last_line, losses, losses_or_none

UNBUFFERED = {"PYTHONUNBUFFERED": "1"}  # so that what a process told outlives it
KILLS = int(os.environ.get("RADONC_KILLS", "3"))


@pytest.fixture(scope="module")
def quiet(workspace, tmp_path_factory):
    """An uninterrupted run, and the seconds it took."""
    workdir = tmp_path_factory.mktemp("quiet") / "run"
    began = time.monotonic()
    run_command("train", *workspace.arguments, *SHORT, f"--workdir={workdir}")
    return workdir, time.monotonic() - began


def command(workspace, workdir, *arguments):
    settings = (*workspace.arguments, *SHORT, *arguments)
    return ["-m", "radonc_jax.train", *settings, f"--workdir={workdir}"]


def begin(workspace, workdir, *arguments, devices=1):
    return subprocess.Popen(
        [sys.executable, *command(workspace, workdir, *arguments)],
        cwd=ROOT,
        env=command_environment(devices) | UNBUFFERED,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def two_processes(*command):
    """Started together, to find each other over loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=command_environment()
            | {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(index),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]


def told_to_end(message, moment, how, *arguments):
    """What a run tells that ends as told; `tests/told.py` has the moments."""
    result = subprocess.run(
        [sys.executable, "tests/told.py", moment, how, *arguments],
        cwd=ROOT,
        env=command_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 75, result.stderr[-2000:]
    told = f"told to end: {message}; the same command goes on from the last checkpoint"
    assert told in result.stderr.splitlines(), result.stderr[-2000:]
    return result.stdout


def wait_for_step(step, workdir, *processes):
    deadline = time.monotonic() + 300
    while (step, "train") not in losses_or_none(workdir):
        assert time.monotonic() < deadline
        for process in processes:
            assert process.poll() is None, process.stdout.read()[-2000:]
        time.sleep(0.005)


def assert_same_end(workdir, quiet):
    """Losses, choice of the best, answers and scores, bit for bit."""
    assert losses(workdir) == losses(quiet)
    assert (workdir / "best.json").read_text() == (quiet / "best.json").read_text()
    for model in ("original", "tuned"):
        for name in ("predictions.jsonl", "metrics.json"):
            place = f"evaluation/test/{model}/{name}"
            assert (workdir / place).read_bytes() == (quiet / place).read_bytes(), place
    assert not list(workdir.rglob("*.partial"))


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_as_a_quiet_run_does(quiet, workspace, tmp_path):
    moments = random.Random(7)
    runs, kills, resumed = 1, 0, 0
    workdir = tmp_path / "run1"
    while kills < KILLS:
        saved = newest_checkpoint(workdir)
        process = begin(workspace, workdir)
        try:
            process.wait(moments.uniform(0.2, 1.0) * quiet[1])
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            kills += 1
        output = process.communicate()[0]
        assert process.returncode in (0, -signal.SIGKILL), output[-3000:]
        if "parameters train" in output:  # it got to its first step
            assert saved == 0 or f"resumed at step {saved} of 6" in output, output[-3000:]
            resumed += saved > 0
        if process.returncode == 0:  # it got to its end before the blow: another one
            assert_same_end(workdir, quiet[0])
            runs += 1
            workdir = tmp_path / f"run{runs}"
    saved = newest_checkpoint(workdir)
    result = run_command("train", *workspace.arguments, *SHORT, f"--workdir={workdir}")
    assert saved == 0 or f"resumed at step {saved} of 6" in result.stdout
    assert resumed or saved, "no blow fell after a checkpoint"
    assert_same_end(workdir, quiet[0])


# `evaluate`, at a pace at which blows fall between answers.
SLOWLY = """
import time
from radonc_jax import command, evaluate
from radonc_jax.decoding.journal import Journal

add = Journal.add

def slowly(*arguments):
    add(*arguments)
    time.sleep(0.05)

Journal.add = slowly
command.run(evaluate.main)
"""


@pytest.mark.slow
def test_evaluate_killed_at_random_moments_ends_as_a_quiet_one_does(quiet, tmp_path):
    moments = random.Random(11)
    workdir = tmp_path / "run"
    shutil.copytree(quiet[0], workdir)
    shutil.rmtree(workdir / "evaluation")
    place = workdir / "evaluation" / "test" / "tuned"
    journal = place / ".answers.jsonl"

    def kept():
        """The lines of answers that are whole."""
        lines = journal.read_bytes().splitlines(keepends=True) if journal.exists() else []
        return [line for line in lines if line.endswith(b"\n")]

    expected = (quiet[0] / "evaluation/test/tuned/predictions.jsonl").read_bytes()
    total = expected.count(b"\n")
    for blow in range(min(max(KILLS, 2), 6)):
        before = kept()
        process = subprocess.Popen(
            [sys.executable, "-c", SLOWLY, f"--workdir={workdir}"],
            cwd=ROOT,
            env=command_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            deadline = time.monotonic() + 300
            if blow == 0:  # before there is any answer
                time.sleep(moments.uniform(0.1, 3))
            else:
                wanted = len(before) + moments.randint(1, max(1, (total - len(before)) // 4))
                while process.poll() is None and len(kept()) < wanted:
                    assert time.monotonic() < deadline
                    time.sleep(0.001)
                time.sleep(moments.uniform(0, 0.05))
        finally:
            process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not (place / "predictions.jsonl").exists()
        # What was answered is kept, and asked no more.
        assert kept()[: len(before)] == before and (blow == 0 or len(kept()) > len(before))
    assert 0 < len(kept()) < total
    run_command("evaluate", f"--workdir={workdir}")
    assert (place / "predictions.jsonl").read_bytes() == expected
    assert not journal.exists()


# `evaluate`, where one process of two finds other validation cases on its disk.
ONE_CANNOT_READ = """
import jax
from radonc_jax import command, evaluate
from radonc_jax.data import cohort

load = cohort.load_records

def load_records(folder, split, **options):
    if split == "validation" and jax.process_index() == 1:
        raise ValueError("validation.parquet: changed since prepare wrote it")
    return load(folder, split, **options)

cohort.load_records = load_records
command.run(evaluate.main)
"""


@pytest.mark.slow
def test_two_processes_evaluate_and_predict_as_one_does(quiet, workspace, tmp_path):
    """Two devices then share the batch, so last bits may differ, and tokens may not. What one of
    them cannot ask neither does, and the rest is asked."""
    workdir = tmp_path / "run"
    shutil.copytree(quiet[0], workdir)
    shutil.rmtree(workdir / "evaluation" / "test" / "tuned")
    cases = pd.read_parquet(workspace.cohort / "test.parquet")[["case_id", "diagnosis"]]
    cases.to_csv(tmp_path / "cases.csv", index=False)
    options = (f"--workdir={workdir}", f"--input={tmp_path}/cases.csv")
    evaluating = ("-c", ONE_CANNOT_READ, f"--workdir={workdir}", "--all", "--examples=0")
    predicting = ("-m", "radonc_jax.predict", *options, f"--output={tmp_path}/pair.csv")
    for command in (evaluating, predicting):
        processes = two_processes(*command)
        try:
            outputs = [process.communicate(timeout=300)[0] for process in processes]
        finally:
            for process in processes:  # one may wait for the other for ever
                process.kill()
        failed = command is evaluating
        assert [process.returncode for process in processes] == [failed, failed], outputs
        if failed:
            told = "validation/tuned: process 1: validation.parquet: changed since prepare wrote it"
            assert told in outputs[0] and "report: " in outputs[0]
            assert all("parts failed, each for the reason above" in output for output in outputs)
            assert not (workdir / "evaluation" / "validation").exists()

    def answered(folder):
        return pd.read_json(folder / "evaluation/test/tuned/predictions.jsonl", lines=True)

    alone, pair = answered(quiet[0]), answered(workdir)
    same = ["case_id", "output", "answer", "finished", "correct"]
    assert pair[same].equals(alone[same])
    predicted = pd.read_csv(tmp_path / "pair.csv", dtype=str, keep_default_na=False)
    assert predicted["case_id"].tolist() == cases["case_id"].tolist()
    assert predicted["diagnosis"].tolist() == cases["diagnosis"].tolist()
    by_case = alone.set_index("case_id").loc[predicted["case_id"]]
    assert predicted["answer"].tolist() == by_case["output"].tolist()
    assert predicted["finished"].tolist() == by_case["finished"].astype(str).tolist()
    for found, expected in ((pair, alone), (predicted, by_case)):
        found, expected = (rows["logprob"].astype(float).tolist() for rows in (found, expected))
        assert found == pytest.approx(expected, rel=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cases.csv",
        "pair.csv",
        "run",
    ]
    assert not list(workdir.rglob("*.part*")) and not list(workdir.rglob(".answers*"))


def newest_checkpoint(workdir):
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


# `train`, where the disk is full, or the process is killed, while step 2 is being written.
CUT_OFF = """
import os, resource, signal, sys
from orbax.checkpoint._src.path.atomicity import AtomicRenameTemporaryPath
from radonc_jax import command, train
from radonc_jax.training.checkpoint import Checkpoints

how = sys.argv.pop(1)
save, finalize = Checkpoints.save, AtomicRenameTemporaryPath.finalize

def save_on_a_full_disk(self, step, state, progress):
    if step == 2:
        self.wait()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8, resource.RLIM_INFINITY))
    try:
        save(self, step, state, progress)
        self.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)

async def finalize_or_die(self, *arguments, **options):
    if self._final_path.name == "2":
        os.kill(os.getpid(), signal.SIGKILL)
    return await finalize(self, *arguments, **options)

if how == "full":
    Checkpoints.save = save_on_a_full_disk
else:
    AtomicRenameTemporaryPath.finalize = finalize_or_die
command.run(train.main)
"""


@pytest.mark.slow
def test_cut_off_in_a_write_it_goes_on_from_the_last_whole_checkpoint(quiet, workspace, tmp_path):
    workdir = tmp_path / "run"
    arguments = [*workspace.arguments, *SHORT, "--config.final_evaluation=False"]

    def cut_off(how):
        return subprocess.run(
            [sys.executable, "-c", CUT_OFF, how, *arguments, f"--workdir={workdir}"],
            cwd=ROOT,
            env=command_environment() | UNBUFFERED,
            capture_output=True,
            text=True,
            timeout=300,
        )

    result = cut_off("full")
    assert result.returncode == 1
    # Orbax tells of it too, at length and from a thread of its own; ours is one line.
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: checkpoint ") and "could not be written under" in error
    assert "File too large" in error and "the last whole one is 1. Make room there" in error
    result = cut_off("killed")
    assert result.returncode == -signal.SIGKILL, result.stderr[-2000:]
    assert "resumed at step 1 of 6" in result.stdout
    assert list((workdir / "checkpoints").glob("2.*")) and newest_checkpoint(workdir) == 1
    result = run_command("train", *arguments, f"--workdir={workdir}")
    assert "checkpoint 2 was not written to its end" in result.stdout
    assert (workdir / "damaged" / "2-half-written").is_dir()
    assert "resumed at step 1 of 6" in result.stdout
    assert not list((workdir / "checkpoints").glob("*.*"))
    assert losses(workdir) == losses(quiet[0])
    assert (workdir / "best.json").read_text() == (quiet[0] / "best.json").read_text()


@pytest.mark.slow
def test_told_to_end_all_processes_save_and_others_go_on(quiet, workspace, tmp_path):
    """One of two processes gets the signal; one process, then eight devices, go on from there."""
    workdir = tmp_path / "run"
    processes = two_processes(*command(workspace, workdir))
    wait_for_step(1, workdir, *processes)
    processes[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [75, 75], outputs[0][-3000:]
    assert "told to end: step" in outputs[0]
    # Every step that was done has been saved.
    done = max(step for step, _ in losses(workdir))
    saved = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert done == saved < 6
    expected = losses(quiet[0])
    wider = tmp_path / "wider"
    shutil.copytree(workdir, wider)
    mesh = [f"--config.mesh.{axis}=2" for axis in ("data", "fsdp", "tensor")]
    alone = begin(workspace, workdir, "--config.final_evaluation=False")
    eight = begin(workspace, wider, "--config.final_evaluation=False", *mesh, devices=8)
    for process, folder in ((alone, workdir), (eight, wider)):
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output[-3000:]
        assert f"resumed at step {saved} of 6" in output
        got = losses(folder)
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            assert got[key] == pytest.approx(value, rel=1e-5), (folder.name, key)


@pytest.mark.long
@pytest.mark.slow
def test_a_process_alone_told_to_end_saves_where_it_is(quiet, workspace, tmp_path):
    workdir = tmp_path / "run"
    never = "--config.train.save_every=0"  # but at a validation, after step 3
    process = begin(workspace, workdir, never, "--config.final_evaluation=False")
    wait_for_step(1, workdir, process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 75
    assert "of 6 is saved; the same command goes on from the last checkpoint" in output
    done = max(step for step, _ in losses(workdir))
    assert [int(path.name) for path in (workdir / "checkpoints").iterdir()] == [done]
    final = begin(workspace, workdir, never, "--config.final_evaluation=False")
    assert final.wait(300) == 0
    assert losses(workdir) == losses(quiet[0])


@pytest.mark.long
def test_told_to_end_at_any_moment_it_saves_first_and_goes_on_from_there(
    quiet, workspace, tmp_path
):
    workdir = tmp_path / "run"
    arguments = [*workspace.arguments, *SHORT, f"--workdir={workdir}"]
    told_to_end("no step was under way", "weights", "alone", *arguments)
    assert not workdir.exists()
    told_to_end("step 3 of 6 is saved", "validation", "alone", *arguments)
    assert {key for key in losses(workdir) if key[1] == "validation"} == set()
    assert (workdir / "checkpoints" / "3").is_dir() and not (workdir / "best.json").exists()
    # The sync point of several processes that are told in the last step but one is the last step.
    output = told_to_end("step 6 of 6 is saved", "before the last step", "several", *arguments)
    assert "resumed at step 3 of 6" in output
    assert (3, "validation") in losses(workdir) and (6, "validation") not in losses(workdir)
    output = told_to_end("all steps are saved", "last validation", "alone", *arguments)
    assert "resumed at step 6 of 6" in output
    assert not (workdir / "evaluation").exists()
    assert losses(workdir) == losses(quiet[0])
    assert (workdir / "best.json").read_text() == (quiet[0] / "best.json").read_text()


@pytest.mark.long
def test_told_to_end_in_the_final_evaluation_it_keeps_its_answers(quiet, workspace, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(quiet[0], workdir)
    shutil.rmtree(workdir / "evaluation")
    arguments = [*workspace.arguments, *SHORT, f"--workdir={workdir}"]
    journal = workdir / "evaluation/test/original/.answers.jsonl"
    told_to_end("no step was under way", "answers", "alone", *arguments)
    kept = journal.read_text()
    assert kept and not (journal.parent / "predictions.jsonl").exists()
    told_to_end("the answers so far are kept", "answers", "several", *arguments)
    assert journal.read_text().startswith(kept)
    assert journal.read_text().count("\n") == kept.count("\n") + 1
    run_command("train", *arguments)
    assert_same_end(workdir, quiet[0])


@pytest.mark.slow
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(quiet, workspace, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(quiet[0], workdir)
    for path in (workdir / "checkpoints" / "6" / "trainable").rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)
    # What asks for it by name is told, and nothing is taken for it.
    result = run_command("evaluate", f"--workdir={workdir}", "--step=6", check=False)
    assert "checkpoint 6 of" in last_line(result) and "cannot be read" in last_line(result)
    result = run_command("train", *workspace.arguments, *SHORT, f"--workdir={workdir}")
    assert "checkpoint 6 is damaged" in result.stdout
    assert "resumed at step 5 of 6" in result.stdout
    assert (workdir / "damaged" / "6").is_dir()
    assert_same_end(workdir, quiet[0])


# Saves two checkpoints of arrays that lie in parts on two processes, or restores the newest.
ON_TWO_PROCESSES = """
import sys
from pathlib import Path
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from radonc_jax import parallel
from radonc_jax.training.checkpoint import Checkpoints, Progress
from radonc_jax.training.step import TrainState, fingerprint

parallel.initialize()
mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
parts, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec("fsdp"), PartitionSpec()))
placements = TrainState(whole, {"a": parts, "b": whole}, {"a": parts})
make = jax.jit(
    lambda step: TrainState(
        step, {"a": step + jnp.arange(4096.0), "b": step * jnp.ones(8)}, {"a": step * jnp.ones(64)}
    ),
    out_shardings=placements,
)
checkpoints = Checkpoints(Path(sys.argv[2]))
if sys.argv[1] == "save":
    for step in (1, 2):
        checkpoints.save(step, make(jnp.int32(step)), Progress())
else:
    step, state, _ = checkpoints.restore_newest(jax.eval_shape(make, jnp.int32(0)), placements)
    expected = make(jnp.int32(step))
    assert fingerprint(state) == fingerprint(expected)
    assert state.trainable["a"].sharding == parts
    print("restored", step)
checkpoints.close()
"""


@pytest.mark.slow
def test_damage_that_only_one_of_two_processes_would_meet_is_told_to_both(tmp_path):
    def run(what):
        processes = two_processes("-c", ON_TWO_PROCESSES, what, str(tmp_path))
        try:
            outputs = [process.communicate(timeout=120)[0] for process in processes]
        finally:
            for process in processes:  # one may wait for the other for ever
                process.kill()
        assert [process.returncode for process in processes] == [0, 0], outputs
        return outputs

    run("save")
    assert all("restored 2" in output for output in run("restore"))
    part = tmp_path / "checkpoints" / "2" / "trainable" / "ocdbt.process_1"
    for path in (part / "d").iterdir():
        os.truncate(path, path.stat().st_size // 2)
    outputs = run("restore")
    assert "checkpoint 2 is damaged" in outputs[0] and "damaged" not in outputs[1]
    assert all("restored 1" in output for output in outputs)
    assert (tmp_path / "damaged" / "2").is_dir()


@pytest.mark.long
def test_a_process_of_two_that_is_killed_costs_the_run_nothing(quiet, workspace, tmp_path):
    workdir = tmp_path / "run"
    arguments = command(
        workspace, workdir, "--config.mesh.fsdp=2", "--config.final_evaluation=False"
    )
    processes = two_processes(*arguments)
    try:
        wait_for_step(2, workdir, *processes)
        processes[1].kill()
        processes[0].communicate(timeout=200)  # it does not wait for ever
    finally:
        for process in processes:
            process.kill()
    assert processes[0].returncode != 0
    saved = newest_checkpoint(workdir)
    processes = two_processes(*arguments)
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs[0][-3000:]
    assert saved and f"resumed at step {saved} of 6" in outputs[0]
    got, expected = losses(workdir), losses(quiet[0])
    assert got.keys() == expected.keys()
    assert list(got.values()) == pytest.approx([expected[key] for key in got], rel=1e-5)


def test_a_dry_run_tells_what_a_run_would_do_without_weights(workspace, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(workspace.model, model)
    (model / "model.safetensors").unlink()
    result = run_command(
        "train", *workspace.arguments, *SHORT, f"--config.model={model}", "--dry_run"
    )
    for told in ("examples kept", "tokens: min", "6 steps of 32 examples", "% filled"):
        assert told in result.stdout
    for told in ("answer tokens", "memory per device: ", "attention: xla", "training alone: about"):
        assert told in result.stdout
    assert not (ROOT / "null").exists()


# `train`, on a device that has next to no memory.
SMALL_DEVICE = """
from radonc_jax import command, train
from radonc_jax.training import meters

meters.memory_bytes = lambda device: 2**20
command.run(train.main)
"""


def test_a_dry_run_fails_where_the_step_does_not_fit(workspace):
    arguments = [*workspace.arguments, *SHORT, "--dry_run"]
    result = subprocess.run(
        [sys.executable, "-c", SMALL_DEVICE, *arguments],
        cwd=ROOT,
        env=command_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 1
    assert "GiB a device, which has 0.0: raise batch.microbatches" in last_line(result)
    assert "memory per device" in result.stdout


# `train`, where the platform's own attention passes its self-test on one of two processes alone.
FAILS_ON_ONE = """
from radonc_jax import command, parallel, train
from radonc_jax.models import attention

attention.choose_backend = lambda *_, **__: (
    ("cudnn", "passed") if parallel.is_main_process() else ("xla", "failed its self-test")
)
command.run(train.main)
"""


@pytest.mark.slow
def test_processes_take_an_attention_that_all_of_them_can_use(workspace):
    arguments = [*workspace.arguments, *SHORT, "--dry_run"]
    processes = two_processes("-c", FAILS_ON_ONE, *arguments)
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "attention: xla (process 1: failed its self-test)" in outputs[0]


def test_a_trace_of_some_steps_is_written(workspace, tmp_path):
    workdir = tmp_path / "run"
    arguments = ["train", *workspace.arguments, *SHORT, f"--workdir={workdir}"]
    result = run_command(*arguments, "--profile=3-4", check=False)
    assert "--profile=3-4 must be START:STOP" in last_line(result)
    run_command(*arguments, "--config.final_evaluation=False", "--profile=2:3")
    assert list((workdir / "profile").rglob("*.xplane.pb"))
    entries = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    trained = [entry for entry in entries if entry["split"] == "train"]
    assert all(entry["peak_memory_bytes"] > 10**7 for entry in trained)
    assert all(entry["tokens_per_second"] > 0 for entry in trained)
    assert "mfu" not in trained[0]  # a CPU has no datasheet


def test_programs_are_kept_for_the_next_run(workspace, tmp_path):
    arguments = ["train", *workspace.arguments, *SHORT, "--config.final_evaluation=False"]
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment |= {"JAX_COMPILATION_CACHE_DIR": ""}
    run_command(*arguments, f"--workdir={tmp_path / 'run'}", **environment)
    assert list((tmp_path / "cache" / "radonc_jax" / "compiled").glob("jit_train_step*"))
