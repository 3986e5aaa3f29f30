"""The training step before there are weights: what it needs, what it moves, whether it fits.

Everything is taken from the compiled program itself, for the devices at hand or, through libtpu,
for a TPU topology that is not there.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from radonc_jax import parallel
from radonc_jax.data import batches, cohort
from radonc_jax.models import attention, hub, huggingface, lora
from radonc_jax.models.decoder import Execution, ModelConfig
from radonc_jax.models.lora import LoRAConfig, Partition
from radonc_jax.tasks import select
from radonc_jax.training import meters, step

# The memory beside the weights of a step whose layers are compiled one by one, in multiples of what
# is kept for the backward pass: 1.65 on an H200 with Mistral-7B's shapes, where a loop's is 1.21.
UNROLLED_MEMORY = 1.75
ADVICE = (
    'raise batch.microbatches, set train.recompute="mlp" or "layer", precision.base="int8" or '
    '"nf4", or spread the model with mesh.fsdp'
)
COLLECTIVES = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


@dataclass(frozen=True)
class StepProgram:
    """A compiled training step.

    Attributes:
      arguments: bytes per device of weights, adapter, optimiser state and batch.
      total: bytes per device at its fullest, those included.
      limit: bytes that a device has; None where that is not known.
      flops: of one step on one device, as the compiler counts them (a loop's body once).
      moved: (kind of collective, bytes of its result on a device) of each in the program.
    """

    arguments: int
    total: int
    limit: int | None
    flops: float
    moved: list[tuple[str, int]]

    def check(self) -> None:
        """ValueError unless it fits."""
        if self.limit is not None and self.total > self.limit:
            raise ValueError(
                f"the step needs {self.total / 2**30:.1f} GiB a device, which has "
                f"{self.limit / 2**30:.1f}: {ADVICE}"
            )

    def __str__(self) -> str:
        limit = "" if self.limit is None else f" of {self.limit / 2**30:.1f}"
        return (
            f"memory per device: {self.total / 2**30:.2f} GiB{limit} "
            f"({self.arguments / 2**30:.2f} of it weights, adapter, optimiser and batch)"
        )


def row_layout(architecture: ModelConfig, platform: str, shards: int, wanted: str, dtype) -> dict:
    """How rows are laid out for `shards` devices of a kind; arguments of `data.batches.Batches`.

    `wanted`, `dtype`: the attention asked for, and the type that it computes in.
    """
    # cuDNN looks at no other segment of a row: long rows, which are fuller, cost it nothing.
    apart = platform == "gpu" and wanted != "xla" and jnp.dtype(dtype).itemsize == 2
    return {
        "row_multiple": shards,
        "granule": 128 if platform == "tpu" else 8,
        "attention_cost": 0.0 if apart else meters.attention_cost(architecture),
    }


def choose_execution(
    wanted: str,
    recompute: str,
    architecture: ModelConfig,
    compute,
    stored,
    adapter: LoRAConfig | None,
    quantized: str | None,
    made: Sequence[batches.Batches],
    mesh: Mesh,
) -> tuple[Execution, str]:
    """How a run's steps are carried out, the same in all of its processes, and why.

    Layers are compiled one by one where that was measured to be faster and its memory is known: on
    GPUs that hold the whole model, with packed cuDNN attention, and a plain adapter on a base in
    the type that it computes in.

    Args:
      wanted, recompute: `train.attention` and `train.recompute`.
      compute, stored: types of activations and of the base's weights.
      adapter: None where the whole model trains.
      quantized: as of `lora.partition`.
      made: the batches that it will see.

    Raises:
      ValueError: as `attention.choose_backend`.
    """
    device = mesh.devices.flat[0]

    def choose(wanted: str) -> tuple[str, str, bool]:
        backend, why = attention.choose_backend(
            wanted,
            platform=device.platform,
            dtype=compute,
            num_heads=architecture.num_heads,
            num_kv_heads=architecture.num_kv_heads,
            head_dim=architecture.head_dim,
            row_lengths=[b.row_length for b in made],
        )
        known = backend == "cudnn_packed" and recompute == "nothing" and stored == compute
        known &= adapter is not None and not adapter.dora and not adapter.dropout
        known &= quantized is None and mesh.shape["fsdp"] == mesh.shape["tensor"] == 1
        limit = meters.memory_bytes(jax.local_devices()[0]) if known else None
        if limit is None:
            return backend, why, False
        tokens = max(b.rows * b.row_length // b.config.microbatches for b in made)
        needed = UNROLLED_MEMORY * meters.kept_bytes(architecture, compute)
        needed *= tokens / mesh.shape["data"]
        needed += meters.parameters(architecture) * jnp.dtype(stored).itemsize
        trained = lora.count(lora.partition(architecture, adapter, compute).trainable)
        needed += 16 * trained  # float32, with its gradient and two moments
        return backend, why, needed <= limit

    # Each process tests its own device, and all must compile the same program.
    chosen = parallel.on_all(lambda: choose(wanted))
    backend, why = common_backend([pair[:2] for pair in chosen])
    if any(other != backend for other, *_ in chosen):
        parallel.on_all(lambda: choose(backend))  # not all of them have proven it yet
    config = attention.AttentionConfig(
        backend,
        segments=max(b.segments for b in made),
        segment_length=-(-max(b.longest for b in made) // 64) * 64,
    )
    return Execution(config, recompute, unrolled=all(room for *_, room in chosen)), why


def rows_to_compile(
    task: str,
    folder: str,
    model: Path,
    config: batches.BatchConfig,
    seed: int,
    architecture: ModelConfig,
    shards: int,
) -> tuple[int, int, int, str]:
    """The rows of a step on `shards` TPU chips, which need not be there.

    Args:
      task: name.
      folder, model: cohort and model; where that or the model's tokenizer is not there, each
        example is given a full row, an eighth of its tokens answers.
      config, seed: of the run.

    Returns:
      rows of a microbatch, tokens and places for answer tokens of a row, and what these rest on.
    """
    parts, length = config.microbatches, config.sequence_length
    at_hand = (Path(folder) / "manifest.json").is_file()
    if at_hand and any((model / name).is_file() for name in hub.TOKENIZER_FILES[:2]):
        records = cohort.load_records(folder, "train")
        tokenizer = huggingface.load_tokenizer(model)
        examples, _ = batches.split_examples(records, "train", select(task), tokenizer, config)
        layout = row_layout(architecture, "tpu", shards, "auto", jnp.bfloat16)
        made = batches.Batches(examples, config, epochs=1, seed=seed, **layout)
        return made.rows // parts, made.row_length, made.answer_capacity, f"batches of {folder}"
    rows = -(-config.examples // (parts * shards)) * shards
    missing = "the model's tokenizer" if at_hand else f"a cohort in {folder}"
    return rows, length, length // 8, f"without {missing}, a full row for each example, at most"


def batch_shapes(
    mesh: Mesh, microbatches: int, rows: int, length: int, answers: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and placements of a step's batch, as `data.batches.Batches` makes it.

    Args:
      mesh: over which the rows are spread.
      microbatches, rows: of the step, and in each of them.
      length, answers: tokens of a row, and places for answer tokens in it.
    """
    sharding = NamedSharding(mesh, PartitionSpec(None, parallel.BATCH_AXES))
    sizes = dict(tokens=length, positions=length, segment_ids=length)
    sizes |= dict(answer_index=answers, targets=answers)
    shapes = {
        name: jax.ShapeDtypeStruct((microbatches, rows, size), jnp.int32, sharding=sharding)
        for name, size in sizes.items()
    }
    shapes["weights"] = jax.ShapeDtypeStruct(
        (microbatches, rows, answers), jnp.float32, sharding=sharding
    )
    return shapes


def stored_shapes(partition: Partition, dtype, mesh: Mesh):
    """Shapes and placements of the frozen base as it is loaded: quantised arrays as they are."""

    def stored(path, leaf, sharding):
        kept = parallel.path_name(path).endswith(("codes", "scales"))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if kept else dtype, sharding=sharding)

    placements = parallel.shardings(partition.frozen, mesh)
    return jax.tree_util.tree_map_with_path(stored, partition.frozen, placements)


def common_backend(chosen: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """The attention backend that all processes take and why, from what each would take: "xla" as
    soon as they differ, since two programs would wait for each other for ever."""
    backend, why = chosen[0]
    number = next((n for n, (other, _) in enumerate(chosen) if other != backend), None)
    if number is None:
        return backend, why
    number = 0 if backend == "xla" else number
    return "xla", f"process {number}: {chosen[number][1]}"


def compile_step(
    partition: Partition,
    optimizer: optax.GradientTransformation,
    seed: int,
    mesh: Mesh,
    dtype,
    batch: dict[str, jax.ShapeDtypeStruct],
):
    """The step of `train` for these shapes, compiled (`jax.stages.Compiled`); needs no arrays.

    Raises:
      ValueError: the compiler refuses it, as a TPU's does when the step does not fit.
    """
    shapes, placements = step.state_shardings(partition, optimizer, mesh)
    state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        placements,
    )
    jitted = step.jit_train_step(partition, optimizer, seed, mesh)
    with jax.set_mesh(mesh):
        lowered = jitted.lower(state, stored_shapes(partition, dtype, mesh), batch)
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"the compiler refuses the step: {' '.join(str(error).split())[:300]}. If it does not "
            f"fit: {ADVICE}"
        ) from None


def examine(compiled, device: jax.Device) -> StepProgram:
    """What a compiled step needs and moves."""
    memory = compiled.memory_analysis()
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes
    total += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    total += memory.generated_code_size_in_bytes
    return StepProgram(
        arguments=memory.argument_size_in_bytes,
        total=total,
        limit=meters.memory_bytes(device),
        flops=float((compiled.cost_analysis() or {}).get("flops", 0.0)),
        moved=collectives(compiled.as_text()),
    )


def collectives(text: str) -> list[tuple[str, int]]:
    """(kind, bytes of the result on a device) of each collective in a compiled program's text."""
    widths = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
    found = []
    for line in text.splitlines():
        match = re.search(rf"= (.*?) ({COLLECTIVES})(-start)?\(", line)
        if match:
            arrays = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            size = 0
            for kind, dimensions in arrays:
                count = 1
                for dimension in filter(None, dimensions.split(",")):
                    count *= int(dimension)
                size += count * widths.get(kind, 4)
            found.append((match[2], size))
    return found


def topology_devices(name: str) -> list[jax.Device]:
    """The devices of a TPU topology, such as "v5e:4x4", to compile for; none need be there.

    Raises:
      ValueError: libtpu is not installed, or knows no such topology.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not ask the network who we are
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is touched
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except Exception as error:
        raise ValueError(
            f"cannot compile for the TPU topology {name!r}: "
            f"{' '.join(str(error).split())[:200]}. libtpu must be installed (pip install "
            "'.[tpu]'), and names are like v5e:4x4, v5p:2x2x1, v6e:2x4"
        ) from None


def seconds_of_run(
    config: ModelConfig, tokens: int, devices: list[jax.Device], dtype, *, full: bool
) -> tuple[float, str]:
    """A forecast of the time that training takes, and what it rests on.

    Args:
      tokens: that go through the model in the whole run, padding included.

    Half of the datasheet's peak is taken to be reached; a device without a datasheet is asked for
    a large matrix product, of whose speed half is taken.
    """
    peak = meters.peak_flops(devices[0].device_kind)
    basis = "half of the datasheet's peak"
    if peak is None:
        # Devices that are parts of one CPU share its cores.
        peak = meters.measured_flops(dtype) / jax.local_device_count()
        basis = "half of the speed of a large matrix product here"
    flops = meters.flops_per_token(config, full=full) * tokens
    return flops / (0.5 * peak * len(devices)), basis
