"""The device mesh, the one table that places every array on it, and the start of several hosts.

A parameter path (`layers/self_attn/q_proj/kernel`) matches exactly one rule of `PARAMETER_AXES`,
which names its logical axes; `MESH_AXES` maps logical axes to mesh axes. The same table places
the base, the adapter and, by the path's ending, the optimiser state.
"""

import builtins
import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

import absl.logging
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

BATCH_AXES = ("data", "fsdp")  # mesh axes over which the rows of a batch are spread

PARAMETER_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embed_tokens/embedding", ("vocab", "embed")),
    (r"lm_head/kernel", ("vocab", "embed")),
    (r"(layers/(input|post_attention)_layernorm)/scale", (None, None)),
    (r"norm/scale", (None,)),
    (r"layers/self_attn/q_proj(/base)?/(kernel|codes|scales)", (None, "heads", "embed")),
    (r"layers/self_attn/[kv]_proj(/base)?/(kernel|codes|scales)", (None, "kv_heads", "embed")),
    (r"layers/self_attn/o_proj(/base)?/(kernel|codes|scales)", (None, "embed", "heads")),
    (r"layers/mlp/(gate|up)_proj(/base)?/(kernel|codes|scales)", (None, "mlp", "embed")),
    (r"layers/mlp/down_proj(/base)?/(kernel|codes|scales)", (None, "embed", "mlp")),
    # Adapters follow their base: `a` its input, `b` its output; the rank stays whole.
    (r"layers/(self_attn/[qkv]|mlp/(gate|up))_proj/a", (None, None, "embed")),
    (r"layers/self_attn/o_proj/a", (None, None, "heads")),
    (r"layers/mlp/down_proj/a", (None, None, "mlp")),
    (r"layers/self_attn/q_proj/b", (None, "heads", None)),
    (r"layers/self_attn/[kv]_proj/b", (None, "kv_heads", None)),
    (r"layers/mlp/(gate|up)_proj/b", (None, "mlp", None)),
    (r"layers/(self_attn/o|mlp/down)_proj/b", (None, "embed", None)),
    (r"layers/self_attn/q_proj/magnitude", (None, "heads")),
    (r"layers/self_attn/[kv]_proj/magnitude", (None, "kv_heads")),
    (r"layers/mlp/(gate|up)_proj/magnitude", (None, "mlp")),
    (r"layers/(self_attn/o|mlp/down)_proj/magnitude", (None, "embed")),
    (r"layers/(self_attn|mlp)/\w+_proj/dropout_key", (None, None)),
    (r"(.*/)?(count|step)", ()),
)

MESH_AXES = {
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "embed": "fsdp",
    None: None,
}


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 takes the devices that are left.

    `data` copies the model and splits the batch; `fsdp` splits both; `tensor` splits the heads
    and the MLP of every layer.
    """

    data: int
    fsdp: int
    tensor: int


def initialize() -> None:
    """Joins the processes of a multi-host run before the first use of a device.

    A run is started on several hosts by `JAX_COORDINATOR_ADDRESS` (with `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID`, as `launch/multi_gpu.sh` sets them) or, where the platform knows its workers
    itself (TPU pods), by `RADONC_DISTRIBUTED=auto`, as `launch/tpu_pod.sh` sets it.

    Compiled programs are kept for later runs, in the folder that `JAX_COMPILATION_CACHE_DIR` names
    or in the user's cache.
    """
    if not jax.config.jax_compilation_cache_dir:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "radonc_jax" / "compiled"))
    if os.environ.get("RADONC_DISTRIBUTED") == "auto":
        jax.distributed.initialize()
        return
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if not address:
        return
    missing = [n for n in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID") if n not in os.environ]
    if missing:
        raise ValueError(f"JAX_COORDINATOR_ADDRESS is set, but {' and '.join(missing)} is not")
    jax.distributed.initialize(
        address, int(os.environ["JAX_NUM_PROCESSES"]), int(os.environ["JAX_PROCESS_ID"])
    )


def is_main_process() -> bool:
    """Whether this process writes the run's files."""
    return jax.process_index() == 0


def several_processes() -> bool:
    return jax.process_count() > 1


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh `data x fsdp x tensor` over all devices; ValueError when the sizes do not fit."""
    devices = jax.devices() if devices is None else devices
    sizes = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}
    if any(size == 0 or size < -1 for size in sizes.values()):
        raise ValueError(f"mesh sizes must be positive, or -1 for what is left: {sizes}")
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(f"at most one mesh size may be -1, not {len(free)}: {sizes}")
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if free:
        if len(devices) % fixed:
            raise ValueError(
                f"{len(devices)} devices do not divide by the mesh {sizes}: "
                f"choose sizes whose product divides {len(devices)}"
            )
        sizes[free[0]] = len(devices) // fixed
    elif fixed != len(devices):
        raise ValueError(
            f"the mesh {sizes} takes {fixed} devices, but {len(devices)} are there: "
            "set one size to -1, or choose sizes whose product is the number of devices"
        )
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * 3, devices=devices
    )


def path_name(path) -> str:
    """A pytree path as `layers/self_attn/q_proj/kernel`, the form that rules and messages use."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def partition_spec(name: str, *, optimizer: bool = False) -> PartitionSpec:
    """The placement of one array by its path; ValueError unless exactly one rule matches."""
    # Optimiser states hold copies of the parameter tree: their paths end with a parameter's path.
    prefix = r"(?:[^/]+/)*?" if optimizer else ""
    found = [axes for pattern, axes in PARAMETER_AXES if re.fullmatch(prefix + pattern, name)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} placement rules match {name!r}; exactly one must")
    return PartitionSpec(*(MESH_AXES[axis] for axis in found[0]))


def shardings(tree, mesh: Mesh, *, optimizer: bool = False):
    """NamedShardings of a tree of arrays or shapes.

    Args:
      tree: base, adapter, or (with `optimizer=True`) optimiser state, whose paths end with the
        path of a parameter.
      mesh: from `make_mesh`.

    Returns:
      A tree of the same structure.

    Raises:
      ValueError: a leaf has no rule or several, a rule has another rank than its leaf, or a
        dimension does not divide by its mesh axis.
    """

    def place(path, leaf):
        name = path_name(path)
        spec = partition_spec(name, optimizer=optimizer)
        if len(spec) != len(leaf.shape):
            raise ValueError(f"{name!r} has shape {leaf.shape}, but its placement is {spec}")
        for size, axis in zip(leaf.shape, spec, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                raise ValueError(
                    f"{name!r} of shape {leaf.shape} cannot be split into {mesh.shape[axis]} "
                    f"along the mesh axis {axis!r}: choose a size of that axis that divides {size}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, tree)


def check_heads(num_heads: int, num_kv_heads: int, mesh: Mesh) -> None:
    """ValueError unless each tensor-parallel device holds whole heads."""
    tensor = mesh.shape["tensor"]
    if num_heads % tensor or num_kv_heads % tensor:
        raise ValueError(
            f"the mesh axis 'tensor' has {tensor} devices, but the model has {num_heads} query "
            f"and {num_kv_heads} key/value heads: both must divide by it"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: jax.Array, *axes) -> jax.Array:
    """Asks for a placement of an activation; without a mesh in context it does nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def put(tree, mesh: Mesh, *axes):
    """Host arrays, the same on every process, onto the mesh: each process uploads its shards.

    Args:
      tree: of numpy arrays.
      axes: PartitionSpec entries for the leading dimensions of every array.
    """
    sharding = NamedSharding(mesh, PartitionSpec(*axes))

    def place(array):
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(place, tree)


def describe(mesh: Mesh) -> str:
    device = mesh.devices.flat[0]
    sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    return f"{mesh.size} {device.device_kind} as {sizes}, {jax.process_count()} process(es)"


def quiet_third_parties() -> None:
    """Keeps the libraries' chatter out of the terminal; warnings stay."""
    absl.logging.set_verbosity(absl.logging.WARNING)
    for name in ("absl", "orbax", "jax", "grain"):
        logging.getLogger(name).setLevel(logging.WARNING)


def from_main(content: bytes) -> bytes:
    """What the main process has, in every process. All of them must call; they wait for it."""
    if not several_processes():
        return content
    size = multihost_utils.broadcast_one_to_all(np.int64(len(content)))
    shared = np.zeros(int(size), np.uint8)
    if is_main_process():
        shared[:] = np.frombuffer(content, np.uint8)
    return multihost_utils.broadcast_one_to_all(shared).tobytes()


def on_main(action):
    """What `action` returns on the main process, for JSON, in every process; likewise its error, so
    that no process is left waiting for another. All of them must call.

    Args:
      action: called without arguments, on the main process alone.

    Raises:
      Exception: that of `action`; elsewhere one of the same built-in kind, else a RuntimeError.
    """
    if not several_processes():
        return action()
    told, error = {}, None
    if is_main_process():
        try:
            told = {"result": action()}
        except Exception as raised:
            error, told = raised, {"kind": type(raised).__name__, "message": str(raised)}
    told = json.loads(from_main(json.dumps(told).encode()))
    if error is not None:
        raise error
    if "kind" in told:
        kind = getattr(builtins, told["kind"], RuntimeError)
        raise kind(told["message"])
    return told["result"]


def on_all(action) -> list:
    """What `action` returns on each process, for JSON, in every process. All of them must call.

    Args:
      action: called without arguments.

    Raises:
      ValueError: `action` raised one on some process; that of the first, named, is raised in all.
    """
    if not several_processes():
        return [action()]
    try:
        told = {"result": action()}
    except ValueError as error:
        told = {"message": str(error)}
    content = np.frombuffer(json.dumps(told).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int64(len(content)))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(content)] = content
    gathered = multihost_utils.process_allgather(padded)
    every = [json.loads(row[:size].tobytes()) for row, size in zip(gathered, sizes, strict=True)]
    for number, one in enumerate(every):
        if "message" in one:
            raise ValueError(f"process {number}: {one['message']}")
    return [one["result"] for one in every]
