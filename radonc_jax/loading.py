"""A model ready to run: from a Hugging Face folder, a run folder, or both."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh

from radonc_jax import parallel, settings, tracking
from radonc_jax.data import cohort
from radonc_jax.decoding.scheduler import Scheduler
from radonc_jax.models import hub, huggingface, lora, peft, weight_files
from radonc_jax.models.decoder import ModelConfig
from radonc_jax.training import checkpoint
from radonc_jax.training import step as step_module

MOST_FILES = 3  # of a base that are told where it is another one


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

    def scheduler(self, batch: int, max_new_tokens: int) -> Scheduler:
        """For answers of this model; errors as those of `Scheduler`."""
        return make_scheduler(
            self.partition, self.mesh, self.config, self.stops, batch, max_new_tokens
        )

    @property
    def model(self):
        """The NNX module, for one-off calls; jitted code merges the parts itself."""
        return self.partition.merge(self.trainable, self.frozen)


def make_scheduler(
    partition: lora.Partition,
    mesh: Mesh,
    config: ModelConfig,
    stops: tuple[int, ...],
    batch: int,
    max_new_tokens: int,
) -> Scheduler:
    """The scheduler of a model, whether its arrays are loaded or still in training."""
    return Scheduler(
        partition,
        mesh,
        batch=batch,
        max_new_tokens=max_new_tokens,
        stops=stops,
        context=config.max_position_embeddings,
    )


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


@dataclass(frozen=True)
class Adapter:
    """An adapter that lies in a folder, not yet read.

    Attributes:
      folder: a PEFT folder or a run folder.
      config: of the adapter.
      num_layers: of the model it is for.
      step: of the run's checkpoint; None for a PEFT folder.
    """

    folder: Path
    config: lora.LoRAConfig
    num_layers: int
    step: int | None

    def load(self, partition: lora.Partition, mesh: Mesh):
        """Its arrays on the mesh, float32; errors as `peft.load_weights`."""
        placements = parallel.shardings(partition.trainable, mesh)
        if self.step is None:
            return peft.load_weights(self.folder, partition.trainable, placements, self.num_layers)
        return checkpoint.restore_trainable(
            self.folder, partition.trainable, placements, self.step
        )[1]

    def origin(self) -> dict:
        """Where it lies and the hash of every file that is read, for a run's manifest."""
        if self.step is None:
            files = [self.folder / name for name in (peft.CONFIG, peft.WEIGHTS)]
        else:
            arrays = self.folder / "checkpoints" / str(self.step) / "trainable"
            files = sorted(path for path in arrays.rglob("*") if path.is_file())
        return {
            "folder": str(self.folder),
            "step": self.step,
            "sha256": {
                path.relative_to(self.folder).as_posix(): tracking.file_sha256(path)
                for path in files
            },
        }


def find_adapter(folder: str | Path, num_layers: int, step: str | int = "best") -> Adapter:
    """The adapter of a run folder (its checkpoint `step`) or of a PEFT folder.

    Raises:
      FileNotFoundError: neither is there.
      ValueError: the run trained the whole model, or the adapter is of a kind not supported.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        return Adapter(folder, peft.read_config(folder, num_layers), num_layers, None)
    config = read_settings(folder).adapter
    if config is None:
        raise ValueError(f"{folder} trained the whole model: export it as merged instead")
    return Adapter(folder, config, num_layers, checkpoint.find_step(folder, step))


def starting_adapter(
    config: lora.LoRAConfig, num_layers: int, begun: dict | None = None
) -> Adapter | None:
    """The adapter that `lora.init_from` names; None for a fresh one.

    Args:
      config: of the run's adapter.
      num_layers: of the model.
      begun: the `init_from` of the manifest of a run that has checkpoints: its arrays have long
        been taken over, so it may have gone or moved on since; None is returned then.

    Raises:
      FileNotFoundError, ValueError: as `find_adapter`; or it is another adapter than the
        configuration's, with each difference.
    """
    if not config.init_from:
        return None
    try:
        step = "best" if begun is None or begun["step"] is None else begun["step"]
        given = find_adapter(config.init_from, num_layers, step)
    except (ValueError, FileNotFoundError) as error:
        if begun is not None:
            return None
        raise type(error)(f"lora.init_from: {error}") from None
    differences = []
    for name in ("rslora", "dora"):
        theirs, ours = getattr(given.config, name), getattr(config, name)
        if theirs != ours:
            differences.append(f"{name} is {theirs} there and {ours} here")
    theirs, ours = set(given.config.targets), set(config.targets)
    if theirs != ours:
        differences.append(f"targets are {sorted(theirs)} there and {sorted(ours)} here")
    for target in sorted(theirs & ours):
        for name in ("rank", "alpha"):
            pair = [getattr(side.of(target), name) for side in (given.config, config)]
            if pair[0] != pair[1]:
                differences.append(f"the {name} of {target} is {pair[0]} there and {pair[1]} here")
    if differences:
        raise ValueError(
            f"lora.init_from: {given.folder} holds another adapter than the config asks: "
            f"{'; '.join(differences)}. Set lora.* to the adapter's values"
        )
    return given


def read_settings(workdir: str | Path, base: str | None = None) -> settings.Settings:
    """The settings of a run folder; FileNotFoundError if it is none.

    Args:
      workdir: of `train`.
      base: the base's folder or hub id here; None for the one that the run was made with.
    """
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{workdir} is not a run folder: it has no config.json")
    config = settings.from_mapping(json.loads(path.read_text(encoding="utf-8")))
    return config if base is None else replace(config, model=base)


def find_cohort(config: settings.Settings, workdir: str | Path) -> Path:
    """The cohort that a run was made from: where its settings say, or the copy in its own folder.

    Raises:
      FileNotFoundError: it is at neither place.
      ValueError: what is there is another cohort.
    """
    folder = cohort.of_run(config.cohort, workdir)
    if not cohort.is_finished_cohort(folder):
        raise FileNotFoundError(
            f"{workdir}: the cohort that the run was made from is neither at {config.cohort} nor "
            f"at {Path(workdir) / 'cohort'}; copy it, its manifest.json too, to one of them"
        )
    check_origin(workdir, {"cohort": tracking.cohort_sha256(folder)})
    return folder


def run_mesh(config: settings.Settings) -> Mesh:
    """The mesh of a run's settings; all devices along `data` where those were other hardware's."""
    try:
        return parallel.make_mesh(config.mesh)
    except ValueError:
        return default_mesh()


def load_run(
    workdir: str | Path,
    step: str | int = "best",
    mesh: Mesh | None = None,
    model: str | None = None,
):
    """The tuned model of a run folder, with the settings of the run.

    Args:
      workdir: of `train`.
      step: "best", "latest" or a checkpoint's number.
      mesh: None for all devices along `data`.
      model: the base's folder or hub id; None for the one in the run's settings.

    Raises:
      FileNotFoundError: no run there, no such checkpoint, or its base is gone.
      ValueError: the base is another one than that of the run.
    """
    config = read_settings(workdir, model)
    mesh = default_mesh() if mesh is None else mesh
    number = checkpoint.find_step(workdir, step)  # before the base is read: that takes long
    folder = huggingface.resolve(config.model, workdir, "--base")
    architecture = huggingface.read_config(folder)
    compute = huggingface.as_dtype(config.precision.compute)
    partition = lora.partition(architecture, config.adapter, compute, config.precision.quantized)
    frozen = partition.frozen
    # Config and tokenizer shape answers as weights do. These are compared by their fingerprint; but
    # codes may differ in the last bit between kinds of devices, so there the files are.
    coded = config.adapter is not None and config.precision.quantized is not None
    base = base_origin(config.model, folder, parallel.is_main_process(), weights=coded)
    check_origin(workdir, {"base": base}, weights=coded, option="--base")
    if config.adapter is not None:
        frozen = load_base(folder, architecture, partition, config.precision.stored, mesh)
        if not coded:
            printed = step_module.fingerprint(frozen, told_fingerprint(workdir))
            check_origin(workdir, {"base_fingerprint_before": printed}, option="--base")
    _, trainable = checkpoint.restore_trainable(
        workdir, partition.trainable, parallel.shardings(partition.trainable, mesh), number
    )
    return assemble(
        folder, architecture, config.adapter, partition, trainable, frozen, mesh, number
    )


def load_original(
    config: settings.Settings, mesh: Mesh, workdir: str | Path | None = None
) -> LoadedModel:
    """The untuned model of a config, its base alone, or that of the run in `workdir`: under an
    adapter that does nothing, where the run trains one (`untuned`)."""
    option = "--config.model" if workdir is None else "--base"
    folder = huggingface.resolve(config.model, workdir, option)
    if workdir is not None:
        main = parallel.is_main_process()
        base = base_origin(config.model, folder, main)
        check_origin(workdir, {"base": base}, option=option)
    architecture = huggingface.read_config(folder)
    precision = config.precision
    compute = huggingface.as_dtype(precision.compute)
    adapter = None if workdir is None else config.adapter
    partition = lora.partition(architecture, adapter, compute, precision.quantized)
    weights = load_base(folder, architecture, partition, precision.stored, mesh)
    if adapter is None:
        return assemble(
            folder, architecture, None, partition, weights, partition.frozen, mesh, None
        )
    loaded = assemble(folder, architecture, adapter, partition, None, weights, mesh, None)
    return untuned(loaded, config.seed)


def untuned(loaded: LoadedModel, seed: int) -> LoadedModel:
    """The base of a model with an adapter under a fresh one. So `train` asks the original model,
    and whatever asks it again keeps what it has answered."""
    fresh = new_adapter(loaded.partition, loaded.frozen, seed, loaded.mesh)
    return replace(loaded, trainable=fresh, step=None)


def arithmetic(architecture: ModelConfig, adapter: lora.LoRAConfig | None) -> dict:
    """What shapes a model's answers besides its arrays, for JSON: {"architecture", "lora"}, the
    latter None without an adapter and without the folder that it began from."""
    settings_of_lora = None
    if adapter is not None:
        settings_of_lora = asdict(replace(adapter, init_from=""))
        del settings_of_lora["init_from"]
    content = {"architecture": asdict(architecture), "lora": settings_of_lora}
    return json.loads(json.dumps(content))  # as it is read again, with lists for tuples


def base_origin(model: str, folder: Path, main: bool, *, weights: bool = True) -> dict:
    """What a run's base is, for its manifest: its name, the folder and revision, hashes of it
    (those of its weights only where `weights`)."""
    return {
        "model": model,
        "folder": str(Path(folder).absolute()),
        "revision": hub.revision(folder),
        "sha256": tracking.base_sha256(folder, main, weights=weights),
    }


def begun_from(workdir: Path) -> dict | None:
    """The adapter that a run with checkpoints began from, as its manifest tells it, or None."""
    manifest = Path(workdir) / "manifest.json"
    if not manifest.is_file() or not any((Path(workdir) / "checkpoints").glob("[0-9]*")):
        return None
    return json.loads(manifest.read_text(encoding="utf-8")).get("init_from")


def told_fingerprint(workdir: str | Path) -> str:
    """The base's fingerprint in a run's manifest, so that one like it can be made; this version's
    mark where the manifest, or the fingerprint in it, is not there."""
    path = Path(workdir) / "manifest.json"
    told = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return told.get("base_fingerprint_before", step_module.FINGERPRINT)


def check_origin(
    workdir: str | Path, now: dict, *, weights: bool = True, option: str | None = None
) -> None:
    """Compares what a run was made from with what is there now.

    Args:
      workdir: a run folder; without a manifest nothing is checked.
      now: some keys of the manifest, as they are now; None values are not compared.
      weights: False where the base's hashes in `now` are without those of its weights.
      option: by which the caller is given a base, for the error; None where the base is the run's.

    Raises:
      ValueError: a base, cohort or starting adapter is another one; which is named.
    """
    path = Path(workdir) / "manifest.json"
    if not path.is_file():
        return
    manifest = then = json.loads(path.read_text(encoding="utf-8"))
    # The same base and cohort may lie elsewhere now.
    for key, name in (("base", "sha256"), ("cohort", "manifest_sha256")):
        then, now = (
            side | {key: (side[key] or {}).get(name)} if key in side else side
            for side in (then, now)
        )
    files = then.get("base") or {}
    if not weights:
        files = {name: hash_ for name, hash_ in files.items() if not name.endswith(".safetensors")}
        then = then | {"base": files}
    changed = [key for key, value in now.items() if value is not None and then.get(key) != value]
    different = []
    if "base" in changed:
        different = sorted({name for name, _ in files.items() ^ now["base"].items()})
        changed[changed.index("base")] = f"base: {', '.join(different)}"
    if not changed:
        return
    if option is None:
        raise ValueError(
            f"{workdir} was made from other files than those there now ({', '.join(changed)} "
            "differ from its manifest.json): put the old files back, or train anew in "
            "another --workdir"
        )
    told = [
        f"{name} {_short(files.get(name))}, here {_short(now['base'].get(name))}"
        for name in different[:MOST_FILES]
    ]
    told += [f"and {len(different) - MOST_FILES} more"] * (len(different) > MOST_FILES)
    if not different:
        prints = [side.get(changed[0]) for side in (then, now)]
        hashes = (text and hashlib.sha256(text.encode()).hexdigest() for text in prints)
        told = ["fingerprint of the weights {}, here {}".format(*map(_short, hashes))]
    wanted = manifest.get("base") or {}
    name = wanted.get("model") or wanted.get("folder") or "not named there"
    if wanted.get("revision") and "@" not in name:
        name += f", revision {_short(wanted['revision'])}"
    raise ValueError(
        f"this is another base than {workdir} was trained on (by its manifest.json: "
        f"{'; '.join(told)}). The base wanted is {name}: give the folder that holds it as {option}"
    )


def _short(digest: str | None) -> str:
    return "not there" if digest is None else digest[:8]


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
    workdir = Path(adapter) if adapter and (Path(adapter) / "config.json").is_file() else None
    folder = huggingface.resolve(model, workdir, "model")
    if workdir is not None:
        base = base_origin(model, folder, parallel.is_main_process())
        check_origin(workdir, {"base": base}, option="model")
    architecture = huggingface.read_config(folder)
    if adapter is None:
        partition = lora.partition(architecture, None, huggingface.as_dtype(dtype), quantized)
        weights = load_base(folder, architecture, partition, dtype, mesh)
        return assemble(
            folder, architecture, None, partition, weights, partition.frozen, mesh, None
        )
    given = find_adapter(adapter, architecture.num_layers, step)
    adapter_config = given.config
    partition = lora.partition(architecture, adapter_config, huggingface.as_dtype(dtype), quantized)
    frozen = load_base(folder, architecture, partition, dtype, mesh)
    trainable = given.load(partition, mesh)
    return assemble(
        folder, architecture, adapter_config, partition, trainable, frozen, mesh, given.step
    )
