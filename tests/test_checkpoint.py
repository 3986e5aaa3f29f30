"""Checkpoints: what is kept, what comes back, what counts as the best."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from radonc_jax import parallel
from radonc_jax.training import checkpoint
from radonc_jax.training.checkpoint import Checkpoints, Progress
from radonc_jax.training.step import TrainState


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
    return *manager.restore(shapes, placements, step), manager


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
    assert steps_of(tmp_path) == [2, 3, 4]

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
