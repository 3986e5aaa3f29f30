"""Writes a run's result for other programs: a PEFT adapter folder, or a merged model folder.

    python -m radonc_jax.export --workdir=runs/icd --format=peft --output=icd-adapter
    python -m radonc_jax.export --workdir=runs/icd --format=merged --output=icd-model

An adapter belongs to its base and loads with peft or vLLM. A merged folder stands alone: every
adapted kernel is base + update, added in float32 and rounded once to the dtype that the base is
stored in; every other tensor is copied bit for bit. A run that trained the whole model has no
adapter and can only be written merged.
"""

import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

from radonc_jax import loading, parallel, tracking
from radonc_jax.models import huggingface, lora, peft
from radonc_jax.training import checkpoint

_WORKDIR = flags.DEFINE_string("workdir", None, "Run folder, from `train`.")
_FORMAT = flags.DEFINE_enum("format", None, ["peft", "merged"], "What to write.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder to be made.")
_STEP = flags.DEFINE_string("step", "best", "Checkpoint: best, latest or its number.")
flags.mark_flags_as_required(["workdir", "format", "output"])


def main(argv):
    del argv
    try:
        export(Path(_WORKDIR.value), _FORMAT.value, Path(_OUTPUT.value), _STEP.value)
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        sys.exit(f"error: {error}")


def export(workdir: Path, kind: str, output: Path, step: str | int = "best") -> None:
    """Writes the folder; its errors say what is missing or does not fit."""
    if output.exists():
        raise FileExistsError(f"{output} exists: choose another output folder or remove it")
    run = loading.read_settings(workdir)
    if kind == "peft" and run.adapter is None:
        raise ValueError(
            f'{workdir} trained the whole model (trainable="full"), so it has no adapter: '
            "use --format=merged"
        )
    number = checkpoint.find_step(workdir, step)
    folder = huggingface.resolve(run.model)
    base = {"folder": str(folder), "sha256": tracking.base_sha256(folder, True)}
    loading.check_origin(workdir, {"base": base})
    config = huggingface.read_config(folder)

    # Shapes alone: the base is not needed as a model, its tensors are read when they are written.
    parts = lora.partition(config, run.adapter, np.float32)
    placements = parallel.shardings(parts.trainable, loading.default_mesh())
    _, trained = checkpoint.restore_trainable(workdir, parts.trainable, placements, number)
    leaves = {
        parallel.path_name(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(trained)
    }
    if kind == "peft":
        peft.save_adapter(output, trained, run.adapter, run.model)
    elif run.adapter is None:
        huggingface.save_folder(output, source=folder, weights=leaves, num_layers=config.num_layers)
    else:
        tensors = merged_tensors(folder, leaves, run.adapter, config.num_layers)
        huggingface.save_tensors(output, source=folder, tensors=tensors)
    print(f"{output}: {kind} of step {number} of {workdir}, base {run.model}")


def merged_tensors(
    folder: Path, adapter: dict[str, jax.Array], config: lora.LoRAConfig, num_layers: int
) -> dict[str, huggingface.Tensor]:
    """The base's tensors with the adapter added, to be read one by one.

    Args:
      folder: of the base.
      adapter: {path: array}, stacked over layers.
      config: of the adapter.
      num_layers: of the model.

    Raises:
      ValueError: a projection of the adapter is not in the base.
    """
    tensors = huggingface.stored_tensors(folder)
    for place in sorted({path.rsplit("/", 1)[0] for path in adapter}):
        parts = [adapter.get(f"{place}/{kind}") for kind in ("a", "b", "magnitude")]
        for layer, name in enumerate(huggingface.tensor_names(f"{place}/kernel", num_layers)):
            if name not in tensors:
                raise ValueError(f"{folder} has no tensor {name}, which the adapter changes")
            base = tensors[name]
            row = [None if part is None else part[layer] for part in parts]
            read = partial(_merge, base, row, config.of(place.rsplit("/", 1)[1]))
            tensors[name] = huggingface.Tensor(base.shape, base.dtype, read)
    return tensors


def _merge(base: huggingface.Tensor, row: list, config: lora.LoRAConfig) -> np.ndarray:
    return np.asarray(lora.adapted_kernel(base.read(), *row, config)).astype(base.dtype)


if __name__ == "__main__":
    app.run(main)
