"""Checkpoints of a run: trained arrays, optimiser state and progress; never the base.

Orbax writes them asynchronously and renames a checkpoint only when it is whole, so a run killed
at any moment finds the last complete one. Each holds a fingerprint of its arrays: one that was
damaged later is set aside, and the one before is used. Kept are the two newest and the best.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, LatestN

from radonc_jax import parallel
from radonc_jax.parallel import path_name
from radonc_jax.training.step import TrainState, checksums, fingerprint, join_checksums

PRINTS = "fingerprints"
TMP_DIR_SUFFIX = ".orbax-checkpoint-tmp"  # Orbax's, of a checkpoint that is being written
ROOM = 4  # what the disk must have, in sizes of a half-written checkpoint, for that to be kept
HALF_WRITTEN = "-half-written"  # in `damaged/`, after the number


@dataclass
class Progress:
    """Where a run stands, apart from its arrays. The position in the data is the step.

    Attributes:
      best_step: of the best validation so far; None before the first.
      best_value: of the metric there.
      bad_evaluations: validations since then without an improvement, for early stopping.
      stopped_early: whether patience ran out.
      validation_due: whether the step of the checkpoint is validated after it was saved; what is
        said above is then from before.
    """

    best_step: int | None = None
    best_value: float | None = None
    bad_evaluations: int = 0
    stopped_early: bool = False
    validation_due: bool = False

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
        self.validation_due = False

    def digest(self) -> str:
        """A hash of all fields."""
        content = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


class _KeepBest:
    """A preservation policy that keeps the checkpoint of the best validation, and that of the best
    before it: should the newer one be damaged, a run goes back to when the older one was best."""

    def __init__(self):
        self.step: int | None = None
        self._before: int | None = None

    def note(self, step: int | None) -> None:
        if step != self.step:
            self.step, self._before = step, self.step

    def should_preserve(self, checkpoints, *, context):
        return [checkpoint.step in (self.step, self._before) for checkpoint in checkpoints]


class _Manager(ocp.CheckpointManager):
    """Does not ask JAX's service whether the run is to end: that counts questions, and the run
    itself asks them (`preemption.Preemption`)."""

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """The `checkpoints/` folder of a run."""

    def __init__(self, workdir: Path):
        for name in ("absl", "orbax"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self._workdir = Path(workdir).absolute()
        self._best = _KeepBest()
        self._failed = False
        parallel.on_main(self._set_aside_half_written)
        self._manager = _Manager(
            self._workdir / "checkpoints",
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy([LatestN(2), self._best]),
                cleanup_tmp_directories=True,
            ),
        )

    def _set_aside_half_written(self) -> None:
        """A run killed in a write has left a part of a checkpoint, which Orbax would remove.

        The newest is kept, and no other: a run that is stopped often would fill its disk. Nor is
        that where the disk is so full that the next checkpoint may need the room.
        """
        aside = self._workdir / "damaged"
        half = list((self._workdir / "checkpoints").glob(f"*{TMP_DIR_SUFFIX}*"))
        if not half:
            return
        newest = max(half, key=lambda path: int(path.name.partition(".")[0]))
        number = newest.name.partition(".")[0]
        told = f"checkpoint {number} was not written to its end: "
        size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
        aside.mkdir(exist_ok=True)
        for older in aside.glob(f"*{HALF_WRITTEN}"):
            shutil.rmtree(older)
        if shutil.disk_usage(aside).free < ROOM * size:
            told += "the part that there was is gone, as the disk is nearly full"
        else:
            os.rename(newest, aside / f"{number}{HALF_WRITTEN}")
            told += (
                f"the part that there is ({size / 1e6:.1f} MB) was moved to "
                f"damaged/{number}{HALF_WRITTEN}, and may be deleted"
            )
        for path in half:
            shutil.rmtree(path, ignore_errors=True)
        print(told, flush=True)

    def save(self, step: int, state: TrainState, progress: Progress) -> None:
        """Starts writing a checkpoint; arrays are copied before this returns.

        Raises:
          OSError: it, or the one before, could not be written.
        """
        is_best = self._note(progress)
        prints = {name: fingerprint(getattr(state, name)) for name in ("trainable", "optimizer")}
        prints["progress"] = progress.digest()
        with self._writing(step):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    trainable=ocp.args.StandardSave(_named(state.trainable)),
                    optimizer=ocp.args.StandardSave(_named(state.optimizer)),
                    progress=ocp.args.JsonSave(dataclasses.asdict(progress) | {PRINTS: prints}),
                ),
            )
        if is_best:
            self._write_best(progress)

    def name_best(self, progress: Progress) -> None:
        """Keeps the best checkpoint, once it was judged, and names it in best.json; as `save`."""
        if self._note(progress):
            self._write_best(progress)

    def _note(self, progress: Progress) -> bool:
        """Whether there is another best checkpoint than before."""
        changed = progress.best_step is not None and progress.best_step != self._best.step
        self._best.note(progress.best_step)
        return changed

    def _write_best(self, progress: Progress) -> None:
        self.wait()  # best.json names whole checkpoints only
        write_best(self._workdir, progress)

    @contextlib.contextmanager
    def _writing(self, step: int | None = None):
        """Errors of a disk, which Orbax wraps in many ways, as one that says what is left."""
        try:
            yield
        except Exception as error:
            self._failed = True
            whole = _steps(self._workdir)
            left = f"the last whole one is {whole[-1]}" if whole else "there is none yet"
            raise OSError(
                f"checkpoint {'' if step is None else f'{step} '}could not be written under "
                f"{self._workdir / 'checkpoints'} ({_short(error)}); {left}. Make room there and "
                "start the same command again: it goes on from that one"
            ) from error

    def restore_newest(self, shapes: TrainState, placements: TrainState):
        """The newest checkpoint that is whole, as (step, TrainState, Progress); None without one.

        Damaged ones are moved to the run's folder `damaged/`, with a message. Of several processes
        the main one judges for all; what another one cannot read then stops the run.

        Raises:
          ValueError: there are checkpoints, but not one can be read; nothing is moved then.
          PermissionError: a file may not be read.
        """
        problems: dict[int, str] = {}
        for number in reversed(self._manager.all_steps()):
            restored = None
            if parallel.several_processes():
                # All read their parts of a checkpoint together, so one that met a damaged file
                # there would leave the others waiting: the main one reads all of it first.
                folder = self._workdir / "checkpoints" / str(number)
                problem = parallel.on_main(lambda f=folder: _attempt(_read_through, f, shapes)[1])
            else:
                restored, problem = _attempt(self._restore, shapes, placements, number)
            if problem is not None:
                problems[number] = problem
                continue
            self._set_aside(problems)
            if restored is None:
                restored = self._restore(shapes, placements, number)
            state, progress = restored
            self._best.note(progress.best_step)
            write_best(self._workdir, progress)
            return number, state, progress
        if problems:
            told = "; ".join(f"{number}: {problem}" for number, problem in problems.items())
            raise ValueError(
                f"none of the checkpoints under {self._workdir / 'checkpoints'} can be read "
                f"({told}). They were left as they are: mend them, or begin anew in another "
                "--workdir"
            )
        return None

    def _set_aside(self, problems: dict[int, str]) -> None:
        """Moves damaged checkpoints out of the way; what they have cost is told."""
        if not problems:
            return
        if parallel.is_main_process():
            aside = self._workdir / "damaged"
            aside.mkdir(exist_ok=True)
            for number, problem in problems.items():
                print(f"checkpoint {number} is damaged ({problem}): moved to damaged/", flush=True)
                names = (f"{number}" + f"-{n}" * (n > 0) for n in itertools.count())
                target = next(aside / name for name in names if not (aside / name).exists())
                os.rename(self._workdir / "checkpoints" / str(number), target)
        if parallel.several_processes():
            multihost_utils.sync_global_devices("damaged checkpoints set aside")
        self._manager.reload()

    def _restore(self, shapes: TrainState, placements: TrainState, step: int):
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
        state = TrainState(
            jax.device_put(jax.numpy.int32(step), placements.step),
            _unnamed(shapes.trainable, restored.trainable),
            _unnamed(shapes.optimizer, restored.optimizer),
        )
        progress, expected = _read_progress(restored.progress)
        for part in expected:
            if fingerprint(getattr(state, part), expected[part]) != expected[part]:
                raise ValueError(f"the {part} arrays are not those that were saved")
        return state, progress

    def wait(self) -> None:
        """Until the last checkpoint is on the disk; raises as `save`."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last write, unless an earlier one has failed and has been told."""
        if not self._failed:
            self.wait()
        with contextlib.suppress(Exception):
            self._manager.close()


def _attempt(read, *arguments) -> tuple:
    """(What `read` returns, None), or (None, what is wrong with the checkpoint)."""
    try:
        return read(*arguments), None
    except (PermissionError, MemoryError, jax.errors.JaxRuntimeError):
        raise  # nothing is wrong with the checkpoint
    except Exception as error:  # whatever a broken file leads to
        return None, _short(error)


def _read_progress(content: dict) -> tuple[Progress, dict[str, str]]:
    """The progress in a checkpoint and the fingerprints of its arrays by part, older ones of which
    lack; ValueError or TypeError if it is damaged."""
    content = dict(content)
    expected = dict(content.pop(PRINTS, {}))
    digest = expected.pop("progress", None)
    progress = Progress(**content)
    if digest not in (None, progress.digest()):
        raise ValueError("the progress is not the one that was saved")
    if unknown := expected.keys() - {"trainable", "optimizer"}:
        raise ValueError(f"there are fingerprints of {sorted(unknown)}")
    return progress, expected


def _read_through(folder: Path, shapes: TrainState) -> None:
    """Reads a checkpoint on this process alone, an array at a time; raises if it is damaged."""
    this = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=this, active_processes={this}, barrier_sync_key_prefix=f"check{this}"
    )

    def reader(handler):
        return ocp.Checkpointer(handler, multiprocessing_options=options)

    with reader(ocp.JsonCheckpointHandler(multiprocessing_options=options)) as checkpointer:
        _, expected = _read_progress(checkpointer.restore(folder / "progress"))
    with reader(ocp.PyTreeCheckpointHandler(multiprocessing_options=options)) as checkpointer:
        for part in ("trainable", "optimizer"):
            told, sums = expected.get(part), []
            for name, shape in _named(getattr(shapes, part)).items():
                array = checkpointer.restore(
                    folder / part,
                    ocp.args.PyTreeRestore(
                        {name: shape},
                        {name: ocp.RestoreArgs(restore_type=np.ndarray)},
                        partial_restore=True,
                    ),
                )[name]
                if (array.shape, array.dtype) != (shape.shape, shape.dtype):
                    raise ValueError(f"{part} {name} is {array.dtype}{array.shape}")
                if told is not None:
                    sums += checksums([array], told)
            if told is not None and join_checksums(sums, told) != told:
                raise ValueError(f"the {part} arrays are not those that were saved")


def write_best(workdir: Path, progress: Progress) -> None:
    """Writes `best.json`: the step and metric of the best validation so far; none, no file."""
    if not parallel.is_main_process():
        return
    path = Path(workdir) / "best.json"
    if progress.best_step is None:
        path.unlink(missing_ok=True)
        return
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
    steps = _steps(workdir)
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
      ValueError: it is damaged, or another model's.
    """
    number = find_step(workdir, step)
    logging.getLogger("absl").setLevel(logging.WARNING)
    folder = Path(workdir).absolute() / "checkpoints" / str(number)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(folder / "trainable", _targets(abstract, shardings))
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
            expected = checkpointer.restore(folder / "progress").get(PRINTS)
        trainable = _unnamed(abstract, restored)
        told = expected and expected["trainable"]
        if told is not None and fingerprint(trainable, told) != told:
            raise ValueError("the arrays are not those that were saved")
    except Exception as error:
        raise ValueError(
            f"checkpoint {number} of {workdir} cannot be read ({_short(error)}): choose another "
            "--step; where it is the newest, train goes back to the one before, and where it is "
            f"the best, train ends with the last one once {folder} is moved away"
        ) from error
    return number, trainable


def _steps(workdir: Path) -> list[int]:
    """Steps of the whole checkpoints, in order."""
    folder = Path(workdir) / "checkpoints"
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())


def _short(error: Exception) -> str:
    """The first line of a message: those of the storage library go on for pages."""
    return " ".join((str(error).strip() or type(error).__name__).splitlines()[0].split())[:200]


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
