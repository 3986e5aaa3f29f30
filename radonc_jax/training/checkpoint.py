"""Checkpoints of a run: trained arrays, optimiser state and progress; never the base.

Orbax writes them asynchronously and renames a checkpoint only when it is whole, so a run killed
at any moment finds the last complete one. Kept are the two newest and the best.
"""

import dataclasses
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, LatestN

from radonc_jax import parallel
from radonc_jax.parallel import path_name
from radonc_jax.training.step import TrainState


@dataclass
class Progress:
    """Where a run stands, apart from its arrays. The position in the data is the step.

    Attributes:
      best_step: of the best validation so far; None before the first.
      best_value: of the metric there.
      bad_evaluations: validations since then without an improvement, for early stopping.
      stopped_early: whether patience ran out.
    """

    best_step: int | None = None
    best_value: float | None = None
    bad_evaluations: int = 0
    stopped_early: bool = False

    def judge(self, step: int, value: float, *, sign: int, patience: int) -> None:
        """Notes whether a validation is the best so far, and whether patience has run out.

        Args:
          step: at which it was made.
          value: of the metric.
          sign: 1 if more is better, -1 if less is.
          patience: validations in a row without improvement that stop the run; 0 never does.
        """
        if self.best_value is None or sign * value > sign * self.best_value:
            self.best_step, self.best_value, self.bad_evaluations = step, value, 0
        else:
            self.bad_evaluations += 1
        self.stopped_early = 0 < patience <= self.bad_evaluations


class _KeepBest:
    """A preservation policy that keeps the checkpoint of the best validation."""

    def __init__(self):
        self.step: int | None = None

    def should_preserve(self, checkpoints, *, context):
        return [checkpoint.step == self.step for checkpoint in checkpoints]


class Checkpoints:
    """The `checkpoints/` folder of a run."""

    def __init__(self, workdir: Path):
        for name in ("absl", "orbax"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self._workdir = Path(workdir).absolute()
        self._best = _KeepBest()
        self._manager = ocp.CheckpointManager(
            self._workdir / "checkpoints",
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy([LatestN(2), self._best]),
                cleanup_tmp_directories=True,
            ),
        )

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, progress: Progress) -> None:
        """Starts writing a checkpoint; arrays are copied before this returns."""
        is_best = progress.best_step is not None and progress.best_step != self._best.step
        self._best.step = progress.best_step
        self._manager.save(
            step,
            args=ocp.args.Composite(
                trainable=ocp.args.StandardSave(_named(state.trainable)),
                optimizer=ocp.args.StandardSave(_named(state.optimizer)),
                progress=ocp.args.JsonSave(dataclasses.asdict(progress)),
            ),
        )
        if is_best:
            # best.json names whole checkpoints only.
            self._manager.wait_until_finished()
            write_best(self._workdir, progress)

    def restore(self, shapes: TrainState, placements: TrainState, step: int):
        """A checkpoint as (TrainState, Progress), placed as asked."""
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                trainable=ocp.args.StandardRestore(
                    _targets(shapes.trainable, placements.trainable)
                ),
                optimizer=ocp.args.StandardRestore(
                    _targets(shapes.optimizer, placements.optimizer)
                ),
                progress=ocp.args.JsonRestore(),
            ),
        )
        progress = Progress(**restored.progress)
        self._best.step = progress.best_step
        write_best(self._workdir, progress)
        return (
            TrainState(
                jax.device_put(jax.numpy.int32(step), placements.step),
                _unnamed(shapes.trainable, restored.trainable),
                _unnamed(shapes.optimizer, restored.optimizer),
            ),
            progress,
        )

    def close(self) -> None:
        """Waits for the last write."""
        self._manager.wait_until_finished()
        self._manager.close()


def write_best(workdir: Path, progress: Progress) -> None:
    """Writes `best.json`: the step and metric of the best validation so far."""
    if progress.best_step is None or not parallel.is_main_process():
        return
    path = Path(workdir) / "best.json"
    aside = path.with_suffix(".json.partial")
    content = {"step": progress.best_step, "value": progress.best_value}
    aside.write_text(json.dumps(content) + "\n", encoding="utf-8")
    os.replace(aside, path)


def find_step(workdir: Path, step: str | int) -> int:
    """The number of the checkpoint that "best", "latest" or a number names.

    "best" is the newest one when the run never validated.

    Raises:
      FileNotFoundError: the run has no such checkpoint; those it has are listed.
    """
    folder = Path(workdir) / "checkpoints"
    steps = sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit())
    if not steps:
        raise FileNotFoundError(f"{workdir} has no checkpoint: has the run been started?")
    if step == "latest":
        return steps[-1]
    if step == "best":
        best = Path(workdir) / "best.json"
        chosen = json.loads(best.read_text())["step"] if best.is_file() else steps[-1]
    else:
        if not str(step).isdigit():
            raise ValueError(f'--step must be "best", "latest" or a number, not {step!r}')
        chosen = int(step)
    if chosen not in steps:
        raise FileNotFoundError(f"{workdir} has no checkpoint {chosen}; it has {steps}")
    return chosen


def restore_trainable(workdir: Path, abstract, shardings, step: str | int):
    """The trained arrays alone, as (step, tree like `abstract`).

    Raises:
      FileNotFoundError: no such checkpoint.
    """
    number = find_step(workdir, step)
    logging.getLogger("absl").setLevel(logging.WARNING)
    path = Path(workdir).absolute() / "checkpoints" / str(number) / "trainable"
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(path, _targets(abstract, shardings))
    return number, _unnamed(abstract, restored)


def _named(tree) -> dict[str, jax.Array]:
    """A flat {path: array}: what is on disk does not depend on the classes of the tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path).replace("/", "."): leaf for path, leaf in leaves}


def _targets(shapes, placements) -> dict[str, jax.ShapeDtypeStruct]:
    def target(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return _named(jax.tree.map(target, shapes, placements))


def _unnamed(shapes, named: dict[str, jax.Array]):
    def pick(path, _):
        return named[path_name(path).replace("/", ".")]

    return jax.tree_util.tree_map_with_path(pick, shapes)
