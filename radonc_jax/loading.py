"""A model ready to run: from a Hugging Face folder, a run folder, or both."""

import json
from dataclasses import dataclass
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh

from radonc_jax import parallel, settings, tracking
from radonc_jax.models import hub, huggingface, lora, peft, weight_files
from radonc_jax.models.decoder import ModelConfig
from radonc_jax.training import checkpoint
from radonc_jax.training import step as step_module


@dataclass(frozen=True)
class LoadedModel:
    """A model's parts with their arrays on the mesh.

    Attributes:
      config: the architecture.
      lora: the adapter's configuration; None without one.
      partition: how the arrays make a model.
      trainable: the adapter (or, in full-parameter mode or without adapter, the model).
      frozen: the base under an adapter; empty otherwise.
      tokenizer, stops: of the folder; token ids that end an answer.
      folder: the base's Hugging Face folder.
      mesh: where the arrays lie.
      step: of the checkpoint; None when it is not a run's.
    """

    config: ModelConfig
    lora: lora.LoRAConfig | None
    partition: lora.Partition
    trainable: nnx.State
    frozen: nnx.State
    tokenizer: object
    stops: tuple[int, ...]
    folder: Path
    mesh: Mesh
    step: int | None

    @property
    def model(self):
        """The NNX module, for one-off calls; jitted code merges the parts itself."""
        return self.partition.merge(self.trainable, self.frozen)


def default_mesh() -> Mesh:
    return parallel.make_mesh(parallel.MeshConfig(data=-1, fsdp=1, tensor=1))


def load_base(folder: Path, config: ModelConfig, partition, stored: str, mesh: Mesh):
    """The weights of a folder, placed: `partition.frozen`, or `trainable` without an adapter.

    Args:
      folder, config: the checkpoint and its architecture.
      partition: of the model they are read into.
      stored: floating type of the weights that the partition does not want quantised.
      mesh: where they go.
    """
    parallel.check_heads(config.num_heads, config.num_kv_heads, mesh)
    whole = not jax.tree.leaves(partition.frozen)
    abstract = partition.trainable if whole else partition.frozen
    return weight_files.load_weights(
        folder,
        abstract,
        parallel.shardings(abstract, mesh),
        huggingface.as_dtype(stored),
        config.num_layers,
    )


def new_adapter(partition: lora.Partition, frozen, seed: int, mesh: Mesh):
    """A fresh adapter on the mesh; with it the model equals its base."""
    placements = parallel.shardings(partition.trainable, mesh)
    draw = jax.jit(
        lambda frozen: lora.init(partition.trainable, frozen, seed), out_shardings=placements
    )
    return draw(frozen)


def read_settings(workdir: str | Path) -> settings.Settings:
    """The settings of a run folder; FileNotFoundError if it is none."""
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{workdir} is not a run folder: it has no config.json")
    return settings.from_mapping(json.loads(path.read_text(encoding="utf-8")))


def load_run(workdir: str | Path, step: str | int = "best", mesh: Mesh | None = None):
    """The tuned model of a run folder, with the settings of the run.

    Args:
      workdir: of `train`.
      step: "best", "latest" or a checkpoint's number.
      mesh: None for all devices along `data`.

    Raises:
      FileNotFoundError: no run there, no such checkpoint, or its base is gone.
    """
    config = read_settings(workdir)
    mesh = default_mesh() if mesh is None else mesh
    number = checkpoint.find_step(workdir, step)  # before the base is read: that takes long
    folder = huggingface.resolve(config.model, workdir)
    architecture = huggingface.read_config(folder)
    compute = huggingface.as_dtype(config.precision.compute)
    partition = lora.partition(architecture, config.adapter, compute, config.precision.quantized)
    frozen = partition.frozen
    if config.adapter is not None:
        frozen = load_base(folder, architecture, partition, config.precision.stored, mesh)
        check_origin(workdir, {"base_fingerprint_before": step_module.fingerprint(frozen)})
    _, trainable = checkpoint.restore_trainable(
        workdir, partition.trainable, parallel.shardings(partition.trainable, mesh), number
    )
    return assemble(
        folder, architecture, config.adapter, partition, trainable, frozen, mesh, number
    )


def load_original(
    config: settings.Settings, mesh: Mesh, workdir: str | Path | None = None
) -> LoadedModel:
    """The untuned model of a config, or of the run in `workdir`: its base, without an adapter."""
    folder = huggingface.resolve(config.model, workdir)
    architecture = huggingface.read_config(folder)
    precision = config.precision
    compute = huggingface.as_dtype(precision.compute)
    partition = lora.partition(architecture, None, compute, precision.quantized)
    weights = load_base(folder, architecture, partition, precision.stored, mesh)
    return assemble(folder, architecture, None, partition, weights, partition.frozen, mesh, None)


def base_origin(model: str, folder: Path, main: bool) -> dict:
    """What a run's base is, for its manifest: its name, the folder and revision, hashes of it."""
    return {
        "model": model,
        "folder": str(folder),
        "revision": hub.revision(folder),
        "sha256": tracking.base_sha256(folder, main),
    }


def check_origin(workdir: str | Path, now: dict) -> None:
    """Compares what a run was made from with what is there now.

    Args:
      workdir: a run folder; without a manifest nothing is checked.
      now: some keys of the manifest, as they are now; None values are not compared.

    Raises:
      ValueError: a base or cohort has been replaced since; which one is named.
    """
    path = Path(workdir) / "manifest.json"
    if not path.is_file():
        return
    then = json.loads(path.read_text(encoding="utf-8"))
    changed = [key for key, value in now.items() if value is not None and then[key] != value]
    if changed:
        raise ValueError(
            f"{workdir} was made from other files than those there now ({', '.join(changed)} "
            "differ from its manifest.json): put the old base and cohort back, or train anew in "
            "another --workdir"
        )


def assemble(folder, architecture, adapter, partition, trainable, frozen, mesh, step):
    """The loaded parts with the folder's tokenizer."""
    tokenizer = huggingface.load_tokenizer(folder)
    return LoadedModel(
        config=architecture,
        lora=adapter,
        partition=partition,
        trainable=trainable,
        frozen=frozen,
        tokenizer=tokenizer,
        stops=huggingface.stop_tokens(folder, tokenizer),
        folder=folder,
        mesh=mesh,
        step=step,
    )


def load_model(
    model: str,
    adapter: str | None = None,
    dtype: str = "bfloat16",
    mesh: Mesh | None = None,
    quantized: str | None = None,
    step: str | int = "best",
) -> LoadedModel:
    """A model of a Hugging Face folder or hub id, with or without an adapter.

    Args:
      model: folder or hub id.
      adapter: a run folder or a PEFT folder.
      dtype: "bfloat16" or "float32", of weights and activations.
      mesh: None for all devices along `data`.
      quantized: "int8" or "nf4" for the projections' weights; None to keep them as `dtype` says.
      step: checkpoint of a run folder: "best", "latest" or a number.

    Raises:
      FileNotFoundError, ValueError: what is missing or does not fit, named.
    """
    mesh = default_mesh() if mesh is None else mesh
    folder = huggingface.resolve(model)
    architecture = huggingface.read_config(folder)
    if adapter is None:
        partition = lora.partition(architecture, None, huggingface.as_dtype(dtype), quantized)
        weights = load_base(folder, architecture, partition, dtype, mesh)
        return assemble(
            folder, architecture, None, partition, weights, partition.frozen, mesh, None
        )
    workdir = Path(adapter) if (Path(adapter) / "config.json").is_file() else None
    if workdir is None:
        adapter_config = peft.read_config(Path(adapter))
    else:
        adapter_config = read_settings(workdir).adapter
        if adapter_config is None:
            raise ValueError(f"{adapter} trained the whole model: export it as merged instead")
    partition = lora.partition(architecture, adapter_config, huggingface.as_dtype(dtype), quantized)
    frozen = load_base(folder, architecture, partition, dtype, mesh)
    placements = parallel.shardings(partition.trainable, mesh)
    if workdir is None:
        step = None
        trainable = peft.load_weights(
            Path(adapter), partition.trainable, placements, architecture.num_layers
        )
    else:
        step, trainable = checkpoint.restore_trainable(
            workdir, partition.trainable, placements, step
        )
    return assemble(folder, architecture, adapter_config, partition, trainable, frozen, mesh, step)
