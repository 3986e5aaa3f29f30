"""Checkpoints: what is kept, what comes back, what counts as the best."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ROOT, command_environment
from orbax.checkpoint._src.path.atomicity import AtomicRenameTemporaryPath

from radonc_jax import parallel
from radonc_jax.training import checkpoint
from radonc_jax.training.checkpoint import Checkpoints, Progress
from radonc_jax.training.step import TrainState, fingerprint


def state_at(step):
    """A train state whose every array depends on the step."""
    trainable = {"norm": {"scale": jnp.arange(4.0) + step}}
    moments = jax.tree.map(lambda leaf: leaf + step, optax.adam(0.1).init(trainable))
    return TrainState(jnp.int32(step), trainable, moments)


def reopened(workdir, step):
    """(TrainState, Progress) of a checkpoint, read by a new manager, and that manager."""
    mesh = parallel.make_mesh(parallel.MeshConfig(1, 1, 1), jax.devices()[:1])
    shapes = jax.eval_shape(lambda: state_at(0))
    placements = jax.tree.map(lambda _: parallel.replicated(mesh), shapes)
    manager = Checkpoints(workdir)
    number, *restored = manager.restore_newest(shapes, placements)
    assert number == step
    return *restored, manager


def steps_of(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def test_everything_comes_back_and_the_best_is_kept_across_a_restart(tmp_path, monkeypatch):
    named = []
    write_best = checkpoint.write_best

    def watched(workdir, progress):
        named.append(progress.best_step)
        # Whoever reads best.json must find what it names.
        assert (workdir / "checkpoints" / str(progress.best_step)).is_dir()
        write_best(workdir, progress)

    monkeypatch.setattr(checkpoint, "write_best", watched)
    manager, progress = Checkpoints(tmp_path), Progress()
    for step, value in ((1, 0.1), (2, 0.7), (3, 0.2), (4, 0.2)):
        progress.judge(step, value, sign=1, patience=9)
        manager.save(step, state_at(step), progress)
    manager.close()
    # The two newest, the best, and the best before it.
    assert steps_of(tmp_path) == [1, 2, 3, 4]

    state, progress, manager = reopened(tmp_path, 4)
    assert progress == Progress(best_step=2, best_value=0.7, bad_evaluations=2)
    for got, expected in zip(jax.tree.leaves(state), jax.tree.leaves(state_at(4)), strict=True):
        np.testing.assert_array_equal(got, expected)
    for step in (5, 6):
        progress.judge(step, 0.3, sign=1, patience=9)
        manager.save(step, state_at(step), progress)
    manager.close()
    assert steps_of(tmp_path) == [2, 5, 6]
    assert json.loads((tmp_path / "best.json").read_text()) == {"step": 2, "value": 0.7}
    assert set(named) == {1, 2}
    found = {name: checkpoint.find_step(tmp_path, name) for name in ("best", "latest", "5", 6)}
    assert found == {"best": 2, "latest": 6, "5": 5, 6: 6}
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 4; it has \[2, 5, 6\]"):
        checkpoint.find_step(tmp_path, "4")


def test_the_best_validation_and_the_end_of_patience():
    progress, seen = Progress(), []
    for step, value in enumerate([3.0, 2.0, 2.0, 2.5, 1.0, 1.5, 1.0, 4.0], start=1):
        progress.judge(step, value, sign=-1, patience=3)
        seen.append((progress.best_step, progress.bad_evaluations, progress.stopped_early))
    best = [1, 2, 2, 2, 5, 5, 5, 5]
    bad = [0, 0, 1, 2, 0, 1, 2, 3]
    assert seen == [(b, n, n == 3) for b, n in zip(best, bad, strict=True)]
    assert progress.best_value == 1.0


def test_more_is_better_where_the_sign_says_so_and_no_patience_never_stops():
    progress = Progress()
    for step, value in enumerate([0.2, 0.5, 0.5, 0.1, 0.1], start=1):
        progress.judge(step, value, sign=1, patience=0)
    assert progress == Progress(best_step=2, best_value=0.5, bad_evaluations=3)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove(path):
    path.unlink()


@pytest.mark.parametrize("harm", [cut, flip, remove])
@pytest.mark.parametrize("part", ["trainable", "optimizer", "progress"])
def test_a_damaged_checkpoint_is_set_aside(part, harm, tmp_path, capsys):
    manager, progress = Checkpoints(tmp_path), Progress()
    for step in (1, 2):
        progress.judge(step, step / 10, sign=1, patience=9)
        manager.save(step, state_at(step), progress)
    manager.close()
    for path in (tmp_path / "checkpoints" / "2" / part).rglob("*"):
        if path.is_file():
            harm(path)
    state, progress, manager = reopened(tmp_path, 1)
    for got, expected in zip(jax.tree.leaves(state), jax.tree.leaves(state_at(1)), strict=True):
        np.testing.assert_array_equal(got, expected)
    assert progress == Progress(best_step=1, best_value=0.1)
    assert (tmp_path / "damaged" / "2").is_dir() and steps_of(tmp_path) == [1]
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 1
    assert "checkpoint 2 is damaged" in capsys.readouterr().out
    # The run goes on, and a second one of that number finds room.
    manager.save(2, state_at(2), progress)
    manager.close()
    assert steps_of(tmp_path) == [1, 2]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"best_step": 2', '"best_step": 3'),
        ('"best_value": 0.2', '"best_value": 0.3'),
        ('"bad_evaluations": 0', '"bad_evaluations": 1'),
        ('"stopped_early": false', '"stopped_early": true'),
        ('"validation_due": true', '"validation_due": false'),
        ('"trainable": "', '"trainable": "0'),
        ('"optimizer": "', '"0ptimizer": "'),
        ('"progress": "', '"progress": "0'),
    ],
)
def test_a_progress_that_is_not_the_one_that_was_saved_is_found(before, after, tmp_path, capsys):
    manager, progress = Checkpoints(tmp_path), Progress()
    for step in (1, 2):
        progress.judge(step, step / 10, sign=1, patience=9)
        progress.validation_due = True
        manager.save(step, state_at(step), progress)
    manager.close()
    (path,) = (tmp_path / "checkpoints" / "2" / "progress").glob("metadata")
    content = json.dumps(json.loads(path.read_text()))
    assert content.count(before) == 1
    path.write_text(content.replace(before, after))
    _, progress, _ = reopened(tmp_path, 1)
    assert progress == Progress(best_step=1, best_value=0.1, validation_due=True)
    assert "checkpoint 2 is damaged" in capsys.readouterr().out


def test_a_step_that_is_judged_after_it_was_saved_is_kept_and_named(tmp_path):
    manager, progress = Checkpoints(tmp_path), Progress()
    for step, value in ((1, 0.1), (2, 0.7), (3, 0.2), (4, 0.3), (5, 0.1)):
        progress.validation_due = True
        manager.save(step, state_at(step), progress)
        progress.judge(step, value, sign=1, patience=9)
        assert not progress.validation_due
        manager.name_best(progress)
        best = json.loads((tmp_path / "best.json").read_text())
        assert best["step"] == min(step, 2)
        assert (tmp_path / "checkpoints" / str(best["step"])).is_dir()
    manager.close()
    assert checkpoint.find_step(tmp_path, "best") == 2
    # What is restored is from before the judgement, which is made again.
    _, progress, manager = reopened(tmp_path, 5)
    manager.close()
    assert progress == Progress(2, 0.7, bad_evaluations=2, validation_due=True)


def test_saving_returns_before_the_checkpoint_is_on_the_disk(tmp_path, monkeypatch):
    go_on, finalize = threading.Event(), AtomicRenameTemporaryPath.finalize

    async def slow(self, *arguments, **options):
        assert go_on.wait(60)
        return await finalize(self, *arguments, **options)

    monkeypatch.setattr(AtomicRenameTemporaryPath, "finalize", slow)
    manager = Checkpoints(tmp_path)
    manager.save(1, state_at(1), Progress())
    assert not (tmp_path / "checkpoints" / "1").exists()
    go_on.set()
    manager.close()
    assert steps_of(tmp_path) == [1]


def files_of(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_half_written_checkpoint_is_set_aside_and_told(tmp_path, capsys, monkeypatch):
    manager = Checkpoints(tmp_path)
    manager.save(1, state_at(1), Progress())
    manager.close()
    assert capsys.readouterr().out == ""

    def left(number):
        half = tmp_path / "checkpoints" / f"{number}.orbax-checkpoint-tmp"
        shutil.copytree(tmp_path / "checkpoints" / "1", half)
        return {path.relative_to(half): path.read_bytes() for path in files_of(half)}

    aside = tmp_path / "damaged"
    for numbers in ([2], [9, 10]):
        content = [left(number) for number in numbers][-1]
        reopened(tmp_path, 1)[2].close()
        told = f"checkpoint {numbers[-1]} was not written to its end: .* damaged/{numbers[-1]}-half"
        assert re.search(told, capsys.readouterr().out)
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
        # The newest of them alone: one for each stop would fill the disk.
        (kept,) = aside.iterdir()
        assert kept.name == f"{numbers[-1]}-half-written"
        assert {p.relative_to(kept): p.read_bytes() for p in files_of(kept)} == content

    left(11)
    full = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: full)
    reopened(tmp_path, 1)[2].close()
    assert "is gone, as the disk is nearly full" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
    assert not list(aside.iterdir())


def test_arrays_that_are_whole_but_not_those_that_were_saved_are_found(tmp_path, monkeypatch):
    manager = Checkpoints(tmp_path)
    manager.save(1, state_at(1), Progress())
    monkeypatch.setattr(checkpoint, "fingerprint", lambda tree: "2:another")
    manager.save(2, state_at(2), Progress())
    manager.close()
    monkeypatch.undo()
    state, _, _ = reopened(tmp_path, 1)
    assert int(state.step) == 1
    mesh = parallel.make_mesh(parallel.MeshConfig(1, 1, 1), jax.devices()[:1])
    shapes = jax.eval_shape(lambda: state_at(0)).trainable
    placements = jax.tree.map(lambda _: parallel.replicated(mesh), shapes)
    os.rename(tmp_path / "damaged" / "2", tmp_path / "checkpoints" / "2")
    with pytest.raises(ValueError, match="checkpoint 2 of .* not those that were saved"):
        checkpoint.restore_trainable(tmp_path, shapes, placements, 2)
    assert checkpoint.restore_trainable(tmp_path, shapes, placements, 1)[0] == 1


def test_a_damaged_best_gives_way_to_the_one_before(tmp_path):
    manager, progress = Checkpoints(tmp_path), Progress()
    for step, value in ((1, 0.1), (2, 0.7), (3, 0.2), (4, 0.3), (5, 0.4), (6, 0.9)):
        progress.judge(step, value, sign=1, patience=9)
        manager.save(step, state_at(step), progress)
    manager.close()
    assert steps_of(tmp_path) == [2, 5, 6]
    for path in (tmp_path / "checkpoints" / "6").rglob("*"):
        if path.is_file():
            cut(path)
    _, progress, manager = reopened(tmp_path, 5)
    assert (progress.best_step, progress.best_value) == (2, 0.7)
    # The run goes on without another best, and finds the one it names.
    progress.judge(6, 0.5, sign=1, patience=9)
    manager.save(6, state_at(6), progress)
    manager.close()
    assert checkpoint.find_step(tmp_path, "best") == 2


def test_a_best_that_is_lost_is_named_no_more(tmp_path):
    manager, progress = Checkpoints(tmp_path), Progress()
    manager.save(1, state_at(1), progress)
    progress.judge(2, 0.5, sign=1, patience=9)
    manager.save(2, state_at(2), progress)
    manager.close()
    assert checkpoint.find_step(tmp_path, "best") == 2
    for path in (tmp_path / "checkpoints" / "2").rglob("*"):
        if path.is_file():
            cut(path)
    _, progress, manager = reopened(tmp_path, 1)
    manager.close()
    assert progress.best_step is None
    assert checkpoint.find_step(tmp_path, "best") == 1  # as of a run that never validated


def test_where_nothing_can_be_read_nothing_is_moved(tmp_path):
    manager = Checkpoints(tmp_path)
    for step in (1, 2):
        manager.save(step, state_at(step), Progress())
    manager.close()
    for path in (tmp_path / "checkpoints").rglob("*"):
        if path.is_file():
            cut(path)
    with pytest.raises(ValueError, match="none of the checkpoints .* can be read"):
        reopened(tmp_path, 1)
    assert steps_of(tmp_path) == [1, 2] and not (tmp_path / "damaged").exists()


def test_a_checkpoint_from_before_there_were_fingerprints_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "PRINTS", "something else")
    manager = Checkpoints(tmp_path)
    manager.save(1, state_at(1), Progress())
    manager.close()
    path = next((tmp_path / "checkpoints" / "1" / "progress").glob("metadata"))
    path.write_text(
        json.dumps({k: v for k, v in json.loads(path.read_text()).items() if " " not in k})
    )
    monkeypatch.undo()
    state, _, _ = reopened(tmp_path, 1)
    assert int(state.step) == 1


def test_a_checkpoint_with_fingerprints_of_the_version_before_is_checked_by_them(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(checkpoint, "fingerprint", lambda tree: fingerprint(tree, ""))
    manager = Checkpoints(tmp_path)
    manager.save(1, state_at(1), Progress())
    monkeypatch.setattr(checkpoint, "fingerprint", lambda tree: "0" * 8)
    manager.save(2, state_at(2), Progress())
    manager.close()
    monkeypatch.undo()
    assert int(reopened(tmp_path, 1)[0].step) == 1
    folders = [tmp_path / "checkpoints" / "1", tmp_path / "damaged" / "2"]
    shapes = jax.eval_shape(lambda: state_at(0))
    checkpoint._read_through(folders[0], shapes)
    with pytest.raises(ValueError, match="arrays are not those that were saved"):
        checkpoint._read_through(folders[1], shapes)


# Files cannot grow beyond a limit: what a full disk does to a writer, for one process alone.
FULL_DISK = """
import resource, signal, sys
sys.path.insert(0, "tests")
from pathlib import Path
from test_checkpoint import state_at
from radonc_jax.training.checkpoint import Checkpoints, Progress

manager = Checkpoints(Path(sys.argv[1]))
manager.save(1, state_at(1), Progress())
manager.wait()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (8, resource.RLIM_INFINITY))
try:
    manager.save(2, state_at(2), Progress())
    manager.wait()
except OSError as error:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    manager.close()
    print(error)
"""


def test_a_full_disk_is_told_and_the_last_whole_checkpoint_stays(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        cwd=ROOT,
        env=command_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "could not be written under" in result.stdout
    assert "the last whole one is 1. Make room there" in result.stdout
    state, _, _ = reopened(tmp_path, 1)
    for got, expected in zip(jax.tree.leaves(state), jax.tree.leaves(state_at(1)), strict=True):
        np.testing.assert_array_equal(got, expected)
