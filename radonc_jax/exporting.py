"""A run's result as a folder for other programs, and what merging costs."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np

from radonc_jax import loading, parallel, tracking
from radonc_jax.data import cohort
from radonc_jax.data.batches import encode_prompt
from radonc_jax.models import huggingface, lora, peft, weight_files
from radonc_jax.settings import Settings
from radonc_jax.tasks import select
from radonc_jax.training import checkpoint

REPORT = "export.json"
LOGITS = 2**28  # held of each model at most: 1 GiB


def export(
    workdir: Path,
    kind: str,
    output: Path,
    step: str | int = "best",
    check_cases: int = 50,
    base: str | None = None,
) -> None:
    """Writes a PEFT adapter folder (`kind` "peft") or a merged Hugging Face folder ("merged").

    Args:
      workdir: of the run.
      kind: "peft" or "merged".
      output: folder to be made; whole or absent.
      step: checkpoint, "best", "latest" or a number.
      check_cases: validation cases that the merged model is compared on; 0 for none.
      base: the base's folder or hub id, which an adapter then names; None for that of the run's
        settings.

    Raises:
      ValueError, FileNotFoundError, FileExistsError: what is missing or does not fit, named.
    """
    if output.exists():
        raise FileExistsError(f"{output} exists: choose another output folder or remove it")
    run = loading.read_settings(workdir, base)
    if kind == "peft" and run.adapter is None:
        raise ValueError(
            f'{workdir} trained the whole model (trainable="full"), so it has no adapter: '
            "use --format=merged"
        )
    number = checkpoint.find_step(workdir, step)
    folder = huggingface.resolve(run.model, workdir, "--base")
    origin = loading.base_origin(run.model, folder, True)
    loading.check_origin(workdir, {"base": origin}, option="--base")
    config = huggingface.read_config(folder)
    records = []
    asks = select(run.task)[0].name != "text"
    if kind == "merged" and run.adapter is not None and check_cases and asks:
        records = _check_records(run, workdir, check_cases)

    # Shapes alone: the base is not needed as a model, its tensors are read when they are written.
    parts = lora.partition(config, run.adapter, np.float32)
    placements = parallel.shardings(parts.trainable, loading.default_mesh())
    _, trained = checkpoint.restore_trainable(workdir, parts.trainable, placements, number)
    leaves = {
        parallel.path_name(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(trained)
    }
    if kind == "peft":
        name = run.model if origin["revision"] is None else run.model.partition("@")[0]
        peft.save_adapter(output, trained, run.adapter, name, origin["revision"])
    else:
        # Until it has been checked, the folder has another name.
        aside = output.with_name(output.name + ".unchecked")
        shutil.rmtree(aside, ignore_errors=True)
        try:
            report = {"run": str(workdir), "step": number, "base": origin}
            if run.adapter is None:
                huggingface.save_folder(
                    aside, source=folder, weights=leaves, num_layers=config.num_layers
                )
            else:
                rounding = Rounding()
                tensors = merged_tensors(folder, leaves, run.adapter, config.num_layers, rounding)
                huggingface.save_tensors(aside, source=folder, tensors=tensors)
                report["rounding"] = rounding.report()
                if records:
                    report["validation"] = compare_answers(run, workdir, number, aside, records)
                    print(_tell(report))
            tracking.write_json(aside / REPORT, report | {"environment": tracking.environment()})
            os.replace(aside, output)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    print(f"{output}: {kind} of step {number} of {workdir}, base {run.model}")


def _tell(report: dict) -> str:
    answers, lost = report["validation"], report["rounding"]["share_of_update"]
    share = "nothing" if lost is None else f"{lost:.2%}"
    return (
        f"{answers['identical']:.1%} of {answers['answers']} answers to {answers['cases']} "
        f"validation cases are the same as those of the run's own model (adapter on a base in "
        f"{answers['base']}); largest logit difference "
        f"{answers['largest_logit_difference']:.2g}; rounding took {share} of the update"
    )


class Rounding:
    """How much of the adapter's update is lost when sums are rounded to the base's dtype."""

    def __init__(self):
        self._squares: dict[str, np.ndarray] = {}  # by projection: of the loss, of the update

    def add(self, name: str, base: np.ndarray, exact: np.ndarray, rounded: np.ndarray) -> None:
        """Notes one merged tensor; `exact` is its float32 sum."""
        lost, update = rounded.astype(np.float32) - exact, exact - base.astype(np.float32)
        squares = [np.sum(np.square(part, dtype=np.float64)) for part in (lost, update)]
        projection = name.split(".")[-2]
        self._squares[projection] = self._squares.get(projection, 0) + np.array(squares)

    def report(self) -> dict:
        """Frobenius norm of what was lost over that of the update; null where nothing changed."""

        def share(squares):
            return float(np.sqrt(squares[0] / squares[1])) if squares[1] else None

        return {
            "share_of_update": share(sum(self._squares.values())),
            "by_projection": {name: share(s) for name, s in sorted(self._squares.items())},
        }


def merged_tensors(
    folder: Path,
    adapter: dict[str, jax.Array],
    config: lora.LoRAConfig,
    num_layers: int,
    rounding: Rounding,
) -> dict[str, weight_files.Tensor]:
    """The base's tensors with the adapter added, to be read one by one.

    Args:
      folder: of the base.
      adapter: {path: array}, stacked over layers.
      config: of the adapter.
      num_layers: of the model.
      rounding: told of each tensor when it is read.

    Raises:
      ValueError: a projection of the adapter is not in the base.
    """
    tensors = weight_files.stored_tensors(folder)
    for place in sorted({path.rsplit("/", 1)[0] for path in adapter}):
        parts = [adapter.get(f"{place}/{kind}") for kind in ("a", "b", "magnitude")]
        for layer, name in enumerate(weight_files.tensor_names(f"{place}/kernel", num_layers)):
            if name not in tensors:
                raise ValueError(f"{folder} has no tensor {name}, which the adapter changes")
            base = tensors[name]
            row = [None if part is None else part[layer] for part in parts]
            own = config.of(place.rsplit("/", 1)[1])
            read = partial(_merge, name, base, row, own, rounding)
            tensors[name] = weight_files.Tensor(base.shape, base.dtype, read)
    return tensors


def _merge(
    name: str, base: weight_files.Tensor, row: list, config: lora.LoRAConfig, rounding: Rounding
) -> np.ndarray:
    stored = base.read()
    exact = np.asarray(lora.adapted_kernel(stored, *row, config))
    rounded = exact.astype(base.dtype)
    rounding.add(name, stored, exact, rounded)
    return rounded


def _check_records(run: Settings, workdir: Path, count: int) -> list:
    try:
        folder = loading.find_cohort(run, workdir)
        return cohort.load_records(folder, "validation", for_run=True)[:count]
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(
            f"the merged model is compared on validation cases, but {error}; "
            "--check_cases=0 leaves the comparison out"
        ) from None


def compare_answers(
    run: Settings, workdir: Path, step: int, merged: Path, records: Sequence
) -> dict:
    """Lets the tuned model of a run, then the merged folder, answer the same prompts.

    The first is the model that the run chose and reported, a quantised base included; the second
    keeps the weights as they were merged. Both calculate as `precision.compute` says.

    Args:
      run: settings, with the base's place here.
      workdir, step: where the adapter is.
      merged: the merged folder.
      records: cases of the validation split, each asked every task of the run.

    Returns:
      Counts, the share of identical answers, and the largest difference of logits wherever a token
      of the first model's answers was chosen. No text.

    Raises:
      ValueError: the devices have no room for one of the two.
    """
    mesh = loading.run_mesh(run)
    precision = run.precision
    float_base = precision.compute if precision.quantized else precision.base
    plain = replace(
        run, model=str(merged), precision=replace(precision, base=float_base), trainable="lora"
    )
    try:
        loaded = loading.load_run(workdir, step, mesh, model=run.model)
        prompts = [
            encode_prompt(loaded.tokenizer, task.prompt(record.diagnosis))
            for record in records
            for task in select(run.task)
        ]
        first = _answers(loaded, run, prompts)
        before = _answer_logits(loaded, prompts, first)
        del loaded  # one model at a time
        loaded = loading.load_original(plain, mesh)
        second = _answers(loaded, run, prompts)
        after = _answer_logits(loaded, prompts, first)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(
            "the devices have no room to compare the merged model with the run's own: export on "
            "larger ones, or leave the comparison out with --check_cases=0"
        ) from None
    return {
        "cases": len(records),
        "answers": len(prompts),
        "identical": float(np.mean([one == two for one, two in zip(first, second, strict=True)])),
        "largest_logit_difference": max(
            float(np.abs(one - two).max()) for one, two in zip(before, after, strict=True)
        ),
        "compute": precision.compute,
        "base": precision.base,
        "merged_computed_as": float_base,
    }


def _answers(loaded: loading.LoadedModel, run: Settings, prompts) -> list[list[int]]:
    scheduler = loaded.scheduler(run.decode.batch, run.decode.max_new_tokens)
    answers = scheduler(loaded.trainable, loaded.frozen, prompts, progress="comparing")
    return [answer.tokens for answer in answers]


def _answer_logits(loaded: loading.LoadedModel, prompts, answers) -> list[np.ndarray]:
    """Float32 logits [answer tokens + 1, V] of each answer: at its prompt's end and its tokens.

    Of the first answers only, as many as LOGITS numbers take.
    """
    room = LOGITS // loaded.config.vocab_size
    kept = int(np.searchsorted(np.cumsum([len(a) + 1 for a in answers]), room, side="right"))
    prompts, answers = prompts[: max(kept, 1)], answers[: max(kept, 1)]
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    longest = max(len(answer) for answer in answers) + 1

    @jax.jit
    def run(trainable, frozen, tokens, asking):
        model = loaded.partition.merge(trainable, frozen)
        positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        return model.logits(model(tokens, positions, asking=asking)[0])

    logits = []
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = np.zeros((1, width), np.int32)
        tokens[0, : len(prompt) + len(answer)] = [*prompt, *answer]
        asking = np.minimum(len(prompt) - 1 + np.arange(longest), width - 1).astype(np.int32)
        with jax.set_mesh(loaded.mesh):
            rows = run(loaded.trainable, loaded.frozen, tokens, asking[None])
        logits.append(np.asarray(rows)[0, : len(answer) + 1])
    return logits
