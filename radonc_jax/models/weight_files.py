"""Weights in and out of safetensors files; never from pickles.

One table, `tensor_names`, maps every parameter to its tensors, and is read both ways. Reading goes
block by block, straight from the files into the devices' memory: a process reads the bytes of its
own shards only, and the host never holds more than a few blocks.
"""

import contextlib
import functools
import json
import math
import mmap
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from radonc_jax.models import quantize
from radonc_jax.models.hub import INDEX, WEIGHTS
from radonc_jax.parallel import path_name

DERIVED = "rotary_emb.inv_freq"  # stored by old exports; follows from rope_theta
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "F64": np.float64}
BLOCK_BYTES = 32 * 2**20  # read and handed over at a time
READERS = 4  # blocks at a time; more do not help once a disk or the page cache is busy
Region = tuple[tuple[int, int], tuple[int, int]]  # (first row, end), (first column, end)


def tensor_names(path: str, num_layers: int) -> list[str] | str:
    """The tensors of one parameter: a name, or for stacked parameters one name per layer."""
    module = path.rsplit("/", 1)[0].removesuffix("/base").replace("/", ".")
    if module == "lm_head":
        return HEAD
    if not module.startswith("layers."):
        return f"model.{module}.weight"
    rest = module.removeprefix("layers.")
    return [f"model.layers.{layer}.{rest}.weight" for layer in range(num_layers)]


@dataclass(frozen=True)
class _Parameter:
    """What the tensors of one module become.

    Attributes:
      names: its tensors, one a layer; a single one for a parameter that is not stacked.
      stacked: whether its arrays have a leading axis of layers.
      shape: of each tensor.
      arrays: {last part of the path: (shape and dtype wanted, sharding)}: one array as it is, or
        "codes" and "scales".
    """

    names: list[str]
    stacked: bool
    shape: tuple[int, ...]
    arrays: dict[str, tuple[jax.ShapeDtypeStruct, jax.sharding.Sharding]]

    @property
    def quantized(self) -> tuple[str, int] | None:
        """(kind, tile) of a quantised kernel."""
        if "codes" not in self.arrays:
            return None
        kind = "int8" if self.arrays["codes"][0].dtype == jnp.int8 else "nf4"
        return kind, self.shape[-1] // self.arrays["scales"][0].shape[-1]

    @property
    def axes(self) -> tuple[int, ...]:
        """Which of (layer, row, column) its arrays have."""
        return (0,) * self.stacked + (1,) * (len(self.shape) == 2) + (2,)

    def regions(self) -> dict[Region, list[jax.Device]]:
        """The part of each tensor that this process's devices hold; replicas share a region."""
        array, sharding = next(iter(self.arrays.values()))
        packed = self.shape[-1] // array.shape[-1]
        found: dict[Region, list[jax.Device]] = {}
        for device, index in sharding.addressable_devices_indices_map(array.shape).items():
            bounds = [s.indices(n)[:2] for s, n in zip(index, array.shape, strict=True)]
            start, end = bounds[-1]
            rows = bounds[-2] if len(self.shape) == 2 else (0, 1)
            found.setdefault((rows, (start * packed, end * packed)), []).append(device)
        return found


def load_weights(folder: Path, abstract, shardings, dtype, num_layers: int):
    """Reads a checkpoint straight into placed arrays.

    Args:
      folder: with `model.safetensors`, or shards and their index.
      abstract: shapes of the parameters wanted (a tree from `lora.partition`); where it has codes
        and scales, the kernel is quantised on its way.
      shardings: of the same structure; each process reads the bytes of its own shards.
      dtype: of the floating arrays; tensors of another floating type are converted.
      num_layers: of the model.

    Returns:
      A tree of arrays.

    Raises:
      FileNotFoundError: no weights, or a shard that the index names is not there.
      ValueError: a damaged file; a missing, unexpected or misshapen tensor; all are named.
    """
    folder = Path(folder)
    parameters = _parameters(abstract, shardings, num_layers)
    with contextlib.ExitStack() as stack:
        location = locate(folder)
        files = {name: stack.enter_context(_File(folder / name)) for name in set(location.values())}
        _check(folder, location, files, parameters)
        jobs = [
            (parameter, region, devices)
            for parameter in parameters.values()
            for region, devices in parameter.regions().items()
        ]
        with ThreadPoolExecutor(READERS) as pool:
            shards = list(pool.map(lambda job: _load(files, location, *job, dtype), jobs))
    placed: dict[tuple[int, str], dict[jax.Device, jax.Array]] = {}
    for (parameter, _, _), by_device in zip(jobs, shards, strict=True):
        for device, arrays in by_device.items():
            for kind, array in arrays.items():
                placed.setdefault((id(parameter), kind), {})[device] = array

    def assemble(path, leaf, sharding):
        place, kind = path_name(path).rsplit("/", 1)
        own = placed[id(parameters[place]), kind]
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, list(own.values()))

    return jax.tree_util.tree_map_with_path(assemble, abstract, shardings)


def _parameters(abstract, shardings, num_layers: int) -> dict[str, _Parameter]:
    """{path of the module: what its tensors become}."""
    grouped: dict[str, dict] = {}
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True):
        place, kind = path_name(path).rsplit("/", 1)
        grouped.setdefault(place, {})[kind] = (leaf, sharding)
    parameters = {}
    for place, arrays in grouped.items():
        names = tensor_names(f"{place}/{next(iter(arrays))}", num_layers)
        stacked = isinstance(names, list)
        leaf = arrays["codes"][0] if "codes" in arrays else next(iter(arrays.values()))[0]
        shape = quantize.kernel_shape(leaf) if "codes" in arrays else leaf.shape
        # Codes first: they tell the region, scales follow.
        arrays = {kind: arrays[kind] for kind in sorted(arrays)}
        parameters[place] = _Parameter(
            names if stacked else [names], stacked, tuple(shape[1:] if stacked else shape), arrays
        )
    return parameters


def _check(folder: Path, location, files, parameters: dict[str, _Parameter]) -> None:
    """ValueError, with all of them named, unless tensors and parameters fit one another."""
    wanted = {name: p.shape for p in parameters.values() for name in p.names}
    present = {name for name in location if not name.endswith(DERIVED)}
    tied_twice = HEAD not in wanted and HEAD in present and EMBEDDING in wanted
    if tied_twice:
        wanted[HEAD] = wanted[EMBEDDING]
    problems = [f"missing tensor {name}" for name in sorted(set(wanted) - present)]
    problems += [f"unexpected tensor {name}" for name in sorted(present - set(wanted))]
    for file, held in sorted(files.items()):
        unlisted = sorted(
            name
            for name in held.tensors
            if location.get(name) != file and not name.endswith(DERIVED)
        )
        problems += [f"unexpected tensor {name} in {file}" for name in unlisted]
    for name in sorted(present & set(wanted)):
        held = files[location[name]].tensors
        if name not in held:
            problems.append(
                f"the index puts tensor {name} into {location[name]}, which does not hold it"
            )
            continue
        if held[name]["dtype"] not in DTYPES:
            problems.append(f"tensor {name} has dtype {held[name]['dtype']}")
        shape = tuple(held[name]["shape"])
        if shape != wanted[name]:
            problems.append(f"tensor {name} has shape {shape}, config.json asks {wanted[name]}")
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" * (len(problems) > 8))
        raise ValueError(f"the weights in {folder} do not fit their config.json: {shown}")
    if tied_twice and not _equal(*((files[location[n]], n) for n in (HEAD, EMBEDDING))):
        raise ValueError(
            f"{folder}: config.json ties the head to the embedding (tie_word_embeddings), but "
            f"{HEAD} and {EMBEDDING} differ"
        )


def _load(files, location, parameter: _Parameter, region: Region, devices, dtype) -> dict:
    """One region of a parameter on the devices that hold it: {device: {kind: array}}."""
    rows, columns = (end - start for start, end in region)
    size = (len(parameter.names), rows, columns)
    packed = {}
    for kind, (array, _) in parameter.arrays.items():
        local = (*size[:2], columns * array.shape[-1] // parameter.shape[-1])
        packed[kind] = tuple(local[axis] for axis in parameter.axes)
    if parameter.quantized is None:
        dtypes = dict.fromkeys(parameter.arrays, dtype)
    else:
        dtypes = {kind: array.dtype for kind, (array, _) in parameter.arrays.items()}
    arrays = None
    # What a device of the host needs as it is stored can be read to where it stays.
    stored = {files[location[name]].dtype(name) for name in parameter.names}
    in_place = devices[0].platform == "cpu" and parameter.quantized is None and stored == {dtype}
    limit = sys.maxsize if in_place else BLOCK_BYTES
    for layer, row, block in _blocks(files, location, parameter.names, region, limit):
        if block.shape == size and parameter.quantized is None:
            [(kind, shape)] = packed.items()
            arrays = {
                kind: jax.device_put(block.reshape(shape).astype(dtype, copy=False), devices[0])
            }
            break
        if arrays is None:
            arrays = {
                kind: jnp.zeros(packed[kind], dtypes[kind], device=devices[0]) for kind in packed
            }
        start = np.array([layer, row, 0], np.int32)
        arrays = _write(arrays, block, start, parameter.axes, parameter.quantized)
        jax.block_until_ready(arrays)  # no more blocks on their way than there are readers
    return {device: jax.device_put(arrays, device) for device in devices}


@functools.partial(jax.jit, static_argnums=(3, 4), donate_argnums=0)
def _write(arrays: dict, block, start, axes, quantized) -> dict:
    """Puts a block [layers, rows, columns] into its place in the arrays, which are given away."""
    parts = dict.fromkeys(arrays, block)
    if quantized is not None:
        parts = quantize.encode(block, *quantized)
    starts = [start[axis] for axis in axes]

    def put(array, part):
        part = part.reshape([part.shape[axis] for axis in axes]).astype(array.dtype)
        # As plain bits: XLA writes bfloat16 into place number by number on a CPU, 30 times slower.
        bits = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
        array, part, dtype = array.view(bits), part.view(bits), array.dtype
        return jax.lax.dynamic_update_slice(array, part, starts).view(dtype)

    return {kind: put(array, parts[kind]) for kind, array in arrays.items()}


def _blocks(
    files, location, names: list[str], region: Region, limit: int
) -> Iterator[tuple[int, int, np.ndarray]]:
    """(layer, row within the region, [layers, rows, columns]) of whole layers, or rows of one.

    Each has at most `limit` bytes, or is a single row.
    """
    (first, end), columns = region
    file = files[location[names[0]]]
    row_bytes = file.dtype(names[0]).itemsize * (columns[1] - columns[0])
    layers = max(1, min(limit // (row_bytes * (end - first)), len(names)))
    rows = max(1, min(limit // row_bytes, end - first))
    for layer in range(0, len(names), layers):
        for row in range(first, end, rows):
            chosen = names[layer : layer + layers]
            part = (row, min(row + rows, end))
            yield (
                layer,
                row - first,
                _read_block([files[location[n]] for n in chosen], chosen, part, columns),
            )


def _read_block(files, names, rows, columns) -> np.ndarray:
    """[layers, rows, columns] of tensors of one shape; float64 comes as float32."""
    dtypes = {file.dtype(name) for file, name in zip(files, names, strict=True)}
    dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
    block = _empty((len(names), rows[1] - rows[0], columns[1] - columns[0]), dtype)
    for file, name, layer in zip(files, names, block, strict=True):
        if file.dtype(name) == dtype:
            file.read(name, rows, columns, layer)
        else:
            own = _empty(layer.shape, file.dtype(name))
            file.read(name, rows, columns, own)
            layer[:] = own
    return block.astype(np.float32) if dtype == np.float64 else block


def _empty(shape: tuple[int, ...], dtype) -> np.ndarray:
    """An array whose start suits a device of the host, which then takes it without a copy."""
    size, alignment = math.prod(shape) * np.dtype(dtype).itemsize, 64
    memory = np.empty(size + alignment, np.uint8)
    start = -memory.ctypes.data % alignment
    return memory[start : start + size].view(dtype).reshape(shape)


class _File:
    """An open safetensors file: what it holds, and reads of any block of it.

    Not through safetensors' own slices, which map the file into memory: its pages would count
    as this process's until others need them.
    """

    def __init__(self, path: Path):
        open_file(path)  # checks the header against the file
        self._path = path
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by __exit__
        header_bytes = int.from_bytes(self._file.read(8), "little")
        self.tensors = json.loads(self._file.read(header_bytes))
        self.tensors.pop("__metadata__", None)
        self._start = 8 + header_bytes
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(DTYPES[self.tensors[name]["dtype"]])

    def read(self, name: str, rows, columns, out: np.ndarray) -> None:
        """Fills `out` [rows, columns], of the stored dtype; a vector is one row."""
        tensor = self.tensors[name]
        width, size = tensor["shape"][-1], self.dtype(name).itemsize
        start = self._start + tensor["data_offsets"][0]
        buffer = out.view(np.uint8)
        if columns[1] - columns[0] == width:
            self._fill(buffer, start + rows[0] * width * size)
            return
        # A cut of columns lies scattered; the file is mapped for it, and its pages given back.
        matrix = np.frombuffer(self._map, self.dtype(name), rows[1] * width, start).reshape(
            rows[1], width
        )
        out[:] = matrix[rows[0] :, columns[0] : columns[1]]
        first = (start + rows[0] * width * size) // mmap.PAGESIZE * mmap.PAGESIZE
        self._map.madvise(mmap.MADV_DONTNEED, first, start + rows[1] * width * size - first)

    def _fill(self, buffer: np.ndarray, offset: int) -> None:
        view = memoryview(buffer).cast("B")
        while view:
            count = os.preadv(self._file.fileno(), [view], offset)
            if not count:
                raise ValueError(f"{self._path} was cut short while it was read: copy it again")
            view, offset = view[count:], offset + count


def _equal(first: tuple[_File, str], second: tuple[_File, str], rows: int = 4096) -> bool:
    """Whether two stored matrices are equal, compared piece by piece."""
    shapes = [tuple(file.tensors[name]["shape"]) for file, name in (first, second)]
    if shapes[0] != shapes[1]:
        return False
    count, width = shapes[0]
    for start in range(0, count, rows):
        part = (start, min(start + rows, count))
        pair = [_read_block([file], [name], part, (0, width)) for file, name in (first, second)]
        if not np.array_equal(*pair):
            return False
    return True


def locate(folder: Path) -> dict[str, str]:
    """{tensor name: file name} of a checkpoint folder."""
    if (folder / INDEX).is_file():
        location = read_json(folder / INDEX).get("weight_map")
        if not isinstance(location, dict) or not location:
            raise ValueError(f"{folder / INDEX} is damaged: it has no weight_map")
        for file in location.values():
            if not isinstance(file, str) or Path(file).name != file:
                raise ValueError(f"{folder / INDEX} is damaged: {file!r} is not a file name")
        missing = sorted({f for f in location.values() if not (folder / f).is_file()})
        if missing:
            raise FileNotFoundError(f"{folder}: the index names files that are missing: {missing}")
        return location
    if not (folder / WEIGHTS).is_file():
        pickles = [p.name for p in folder.glob("*.bin")] + [p.name for p in folder.glob("*.pt*")]
        hint = " Pickled weights are not read: convert them to safetensors." if pickles else ""
        raise FileNotFoundError(f"{folder} holds neither {WEIGHTS} nor {INDEX}.{hint}")
    return {name: WEIGHTS for name in open_file(folder / WEIGHTS).keys()}


def open_file(path: Path):
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        if not os.access(path, os.R_OK):
            raise ValueError(f"{path} cannot be read: ask for permission to read it") from None
        raise ValueError(
            f"{path} is damaged or cut short ({error}): copy or download it again"
        ) from None


def file_paths(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, sorted, for hashing."""
    return [Path(folder) / name for name in sorted(set(locate(Path(folder)).values()))]


@dataclass(frozen=True)
class Tensor:
    """A tensor to be written: known by shape and dtype, read only when its file is written."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def write_shards(folder: Path, tensors: dict[str, Tensor], shard_bytes: int) -> None:
    """Writes tensors into an existing folder, with an index where one file does not hold them.

    At most one file's tensors are in memory.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        single = len(shards) == 1
        file = WEIGHTS if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        arrays = {name: np.ascontiguousarray(tensors[name].read()) for name in shard}
        save_file(arrays, folder / file, metadata={"format": "pt"})
        as_readable_as_others(folder / file)
        weight_map.update({name: file for name in shard})
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def as_readable_as_others(path: Path) -> None:
    """Gives a file the permissions that new files have; safetensors lets only its owner read it."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint folder as it is stored, read on demand.

    Raises:
      FileNotFoundError, ValueError: as `load_weights`.
    """
    folder = Path(folder)
    location = locate(folder)
    readers = {file: open_file(folder / file) for file in sorted(set(location.values()))}
    tensors = {}
    for name, file in location.items():
        part = readers[file].get_slice(name)
        kind = part.get_dtype()
        if kind not in DTYPES:
            raise ValueError(f"{folder / file}: tensor {name} has dtype {kind}, not supported")
        read = functools.partial(readers[file].get_tensor, name)
        tensors[name] = Tensor(tuple(part.get_shape()), np.dtype(DTYPES[kind]), read)
    return tensors


def read_json(path: Path) -> dict:
    """The JSON object in a file; ValueError if it holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return value
