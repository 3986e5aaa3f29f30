"""Hugging Face folders in and out: `config.json`, safetensors, tokenizer.

One table, `tensor_names`, maps every parameter to its tensors, and is read both ways. Weights are
read from safetensors only, never from pickles. Local folders touch no network; a hub id is looked
up in the local cache first.
"""

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from radonc_jax.models import tokenizer
from radonc_jax.models.decoder import Llama3RopeScaling, ModelConfig
from radonc_jax.models.hub import GENERATION, INDEX, TOKENIZER_FILES, WEIGHTS
from radonc_jax.models.hub import resolve as resolve
from radonc_jax.models.tokenizer import load_tokenizer as load_tokenizer
from radonc_jax.parallel import path_name

FAMILIES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
DERIVED = "rotary_emb.inv_freq"  # stored by old exports; follows from rope_theta
EMBEDDING = "model.embed_tokens.weight"
STORED_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "F64": np.float64}
# What `read_config` reads itself.
READ = {
    "architectures",
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "tie_word_embeddings",
    "vocab_size",
}
# Settings that are absent, null, or have the one value that this code carries out.
REQUIRED = {
    "attention_bias": False,
    "attention_dropout": 0,
    "hidden_act": "silu",
    "is_causal": True,
    "mlp_bias": False,
    "partial_rotary_factor": 1,
    "return_dict": True,
}
# Settings that change nothing in a forward pass of these families: names, ids, dtypes, how the
# weights were drawn, what a call returns, defaults of generation. Written by transformers 4 and 5.
INERT = {
    # where it comes from
    "_commit_hash",
    "_name_or_path",
    "name_or_path",
    "transformers_version",
    # the dtype of the stored weights, which the files say themselves
    "dtype",
    "torch_dtype",
    "use_bfloat16",
    # which of several implementations of the same arithmetic is called
    "_attn_implementation_autoset",
    "attn_implementation",
    "chunk_size_feed_forward",
    "gradient_checkpointing",
    "pretraining_tp",
    "torchscript",
    # the start of training from nothing
    "initializer_range",
    # token ids; `stop_tokens` reads eos_token_id
    "bos_token_id",
    "decoder_start_token_id",
    "eos_token_id",
    "pad_token_id",
    "sep_token_id",
    # what a call returns
    "output_attentions",
    "output_hidden_states",
    "return_dict_in_generate",
    "use_cache",
    # heads other than the language model's, and the tokenizer
    "finetuning_task",
    "id2label",
    "label2id",
    "num_labels",
    "prefix",
    "problem_type",
    "task_specific_params",
    "tokenizer_class",
    # marks of other kinds of models, which these two do not look at
    "is_decoder",
    "max_sequence_length",
    "tie_encoder_decoder",
    # defaults of generation
    "bad_words_ids",
    "begin_suppress_tokens",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "length_penalty",
    "max_length",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_scores",
    "remove_invalid_values",
    "repetition_penalty",
    "suppress_tokens",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
}


def read_config(folder: Path) -> ModelConfig:
    """The architecture from `config.json`.

    Every key is read, or known to change nothing (`INERT`), or refused unless it is empty: a
    setting is never ignored because nobody knew it. Keys that transformers may leave out take the
    meaning that their absence has there: the number of key/value heads (those of the queries; 8
    for Mistral), the head size (hidden size over heads), rope theta 10000, Mistral's window of
    4096 (null for none), an untied head.

    Raises:
      FileNotFoundError: no `config.json`.
      ValueError: another family, a missing or misshapen key, or a setting that this code does not
        carry out.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: is {folder} a Hugging Face model folder?")
    raw = _read_json(path)
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"{path}: model_type {family!r} is not supported; this code runs {list(FAMILIES)}"
        )
    architectures = raw.get("architectures")
    if architectures is not None and architectures != [FAMILIES[family]]:
        raise ValueError(
            f"{path}: architectures {architectures} is not supported (only {FAMILIES[family]})"
        )
    for key, value in raw.items():
        if key in READ or key in INERT or value is None:
            continue
        if key in REQUIRED:
            if value != REQUIRED[key]:
                raise ValueError(
                    f"{path}: {key}={value!r} is not supported (only {REQUIRED[key]!r})"
                )
        elif value is not False and value not in ("", [], {}):
            raise ValueError(f"{path}: {key}={value!r} is not supported")

    def read(key, kind, default=None):
        value = raw.get(key)
        if value is None:
            if default is None:
                raise ValueError(f"{path}: the key {key!r} is missing")
            return default
        if isinstance(value, bool) != (kind is bool) or not isinstance(value, (kind, int)):
            raise ValueError(f"{path}: {key} must be of type {kind.__name__}, not {value!r}")
        if kind is not bool and not 0 < value < math.inf:
            raise ValueError(f"{path}: {key} must be positive, not {value!r}")
        return kind(value)

    heads = read("num_attention_heads", int)
    hidden = read("hidden_size", int)
    context = read("max_position_embeddings", int)
    window = None
    if family == "mistral" and raw.get("sliding_window", 4096) is not None:
        window = read("sliding_window", int, 4096)
    elif family == "llama" and raw.get("sliding_window") is not None:
        raise ValueError(f"{path}: sliding_window is not supported in a llama model")
    if raw.get("head_dim") is None and hidden % heads:
        raise ValueError(f"{path}: hidden_size {hidden} does not divide by {heads} heads")
    theta, scaling = _rope(path, raw, context)
    return ModelConfig(
        vocab_size=read("vocab_size", int),
        num_layers=read("num_hidden_layers", int),
        hidden_size=hidden,
        num_heads=heads,
        # Mistral's default holds for a missing key only; null means as many as queries in both.
        num_kv_heads=read(
            "num_key_value_heads",
            int,
            8 if family == "mistral" and "num_key_value_heads" not in raw else heads,
        ),
        head_dim=read("head_dim", int, hidden // heads),
        intermediate_size=read("intermediate_size", int),
        rms_norm_eps=read("rms_norm_eps", float),
        rope_theta=theta,
        rope_scaling=scaling,
        sliding_window=window,
        tie_word_embeddings=read("tie_word_embeddings", bool, False),
        max_position_embeddings=context,
    )


def _rope(path: Path, raw: dict, context: int) -> tuple[float, Llama3RopeScaling | None]:
    """(theta, scaling) from either spelling, or from both if they say the same.

    transformers 4 wrote `rope_theta` and `rope_scaling`, transformers 5 writes `rope_parameters`
    with all of it.
    """
    said = []
    for key in ("rope_parameters", "rope_scaling"):
        rope = raw.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise ValueError(f"{path}: {key} must be a mapping, not {rope!r}")
        if not rope:
            continue
        thetas = [source.get("rope_theta") for source in (rope, raw)]
        if None not in thetas and thetas[0] != thetas[1]:
            raise ValueError(
                f"{path}: rope_theta is {raw['rope_theta']!r}, but {rope['rope_theta']!r} in {key}"
            )
        theta = _rope_theta(path, rope if rope.get("rope_theta") is not None else raw)
        said.append((theta, _rope_scaling(path, key, rope, context)))
    if not said:
        said.append((_rope_theta(path, raw), None))
    if said[0] != said[-1]:
        raise ValueError(f"{path}: rope_parameters and rope_scaling contradict each other")
    return said[0]


def _rope_theta(path: Path, settings: dict) -> float:
    theta = settings.get("rope_theta")
    return _positive(path, "rope_theta", 10000.0 if theta is None else theta)


def _positive(path: Path, key: str, value) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise ValueError(f"{path}: {key} must be a positive number, not {value!r}")
    return float(value)


def _rope_scaling(path: Path, place: str, rope: dict, context: int) -> Llama3RopeScaling | None:
    kinds = [rope[key] for key in ("rope_type", "type") if rope.get(key) is not None]
    if kinds and kinds[0] != kinds[-1]:
        raise ValueError(f"{path}: {place} has two types, {kinds[0]!r} and {kinds[1]!r}")
    kind = kinds[0] if kinds else "default"
    if kind not in ("default", "llama3"):
        raise ValueError(f"{path}: rope type {kind!r} is not supported (only default and llama3)")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    known = {"rope_theta", "rope_type", "type", *(names if kind == "llama3" else ())}
    unknown = sorted(k for k, v in rope.items() if k not in known and v is not None)
    if "partial_rotary_factor" in unknown and rope["partial_rotary_factor"] == 1:
        unknown.remove("partial_rotary_factor")
    if unknown:
        raise ValueError(f"{path}: rope type {kind!r} with {unknown} is not supported")
    if kind == "default":
        return None
    missing = [name for name in names[:3] if rope.get(name) is None]
    if missing:
        raise ValueError(f"{path}: rope type 'llama3' needs {missing}")
    factor, low, high = (_positive(path, name, rope[name]) for name in names[:3])
    if high <= low:
        raise ValueError(f"{path}: high_freq_factor {high:g} must be above low_freq_factor {low:g}")
    original = rope.get(names[3])
    original = _positive(path, names[3], context if original is None else original)
    return Llama3RopeScaling(factor, low, high, int(original))


def tensor_names(path: str, num_layers: int) -> list[str] | str:
    """The tensors of one parameter: a name, or for stacked parameters one name per layer."""
    path = path.replace("/base/kernel", "/kernel")
    stem = path.rsplit("/", 1)[0].replace("/", ".")
    if stem == "lm_head":
        return "lm_head.weight"
    if not stem.startswith("layers."):
        return f"model.{stem}.weight"
    rest = stem.removeprefix("layers.")
    return [f"model.layers.{layer}.{rest}.weight" for layer in range(num_layers)]


def load_weights(folder: Path, abstract, shardings, dtype, num_layers: int):
    """Reads a checkpoint straight into placed arrays.

    Args:
      folder: with `model.safetensors`, or shards and their index.
      abstract: shapes of the parameters wanted (a tree from `lora.partition`).
      shardings: of the same structure; each process reads the bytes of its own shards.
      dtype: of the arrays; tensors of another floating type are converted.
      num_layers: of the model.

    Returns:
      A tree of arrays.

    Raises:
      FileNotFoundError: no weights, or a shard that the index names is not there.
      ValueError: a damaged file; a missing, unexpected or misshapen tensor; all are named.
    """
    folder = Path(folder)
    location = _locate(folder)
    wanted: dict[str, tuple[int, ...]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        names = tensor_names(path_name(path), num_layers)
        stacked = isinstance(names, list)
        for name in names if stacked else [names]:
            wanted[name] = leaf.shape[1:] if stacked else leaf.shape
    present = {name for name in location if not name.endswith(DERIVED)}
    tied_twice = False
    if "lm_head.weight" not in wanted:
        tied_twice = "lm_head.weight" in present
        present.discard("lm_head.weight")
    problems = [f"missing tensor {name}" for name in sorted(set(wanted) - present)]
    problems += [f"unexpected tensor {name}" for name in sorted(present - set(wanted))]
    readers = {file: _open(folder / file) for file in sorted(set(location.values()))}
    held = {file: set(reader.keys()) for file, reader in readers.items()}
    for file, names in held.items():
        unlisted = sorted(n for n in names if n not in location and not n.endswith(DERIVED))
        problems += [f"unexpected tensor {name} in {file}" for name in unlisted]
    slices = {}
    for name in sorted(present & set(wanted)):
        file = location[name]
        if name not in held[file]:
            problems.append(f"the index puts tensor {name} into {file}, which does not hold it")
            continue
        slices[name] = readers[file].get_slice(name)
        if slices[name].get_dtype() not in STORED_DTYPES:
            problems.append(f"tensor {name} has dtype {slices[name].get_dtype()}")
        shape = tuple(slices[name].get_shape())
        if shape != tuple(wanted[name]):
            problems.append(f"tensor {name} has shape {shape}, config.json asks {wanted[name]}")
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" * (len(problems) > 8))
        raise ValueError(f"the weights in {folder} do not fit their config.json: {shown}")

    if tied_twice and not _equal_tensors(readers, location, "lm_head.weight", EMBEDDING):
        raise ValueError(
            f"{folder}: config.json ties the head to the embedding (tie_word_embeddings), but "
            f"lm_head.weight and {EMBEDDING} differ"
        )

    def load(path, leaf, sharding):
        names = tensor_names(path_name(path), num_layers)

        def read(index):
            if isinstance(names, str):
                return np.asarray(slices[names][index]).astype(dtype)
            layers = range(*index[0].indices(num_layers))
            return np.stack(
                [np.asarray(slices[names[layer]][index[1:]]).astype(dtype) for layer in layers]
            )

        return jax.make_array_from_callback(leaf.shape, sharding, read)

    return jax.tree_util.tree_map_with_path(load, abstract, shardings)


def _equal_tensors(readers, location, first: str, second: str, rows: int = 4096) -> bool:
    """Whether two stored matrices are equal, compared piece by piece."""
    pair = [readers[location[name]].get_slice(name) for name in (first, second)]
    shapes = [tuple(part.get_shape()) for part in pair]
    return shapes[0] == shapes[1] and all(
        np.array_equal(pair[0][start:end], pair[1][start:end])
        for start in range(0, shapes[0][0], rows)
        for end in [min(start + rows, shapes[0][0])]  # safetensors refuses to read past the end
    )


def _locate(folder: Path) -> dict[str, str]:
    """{tensor name: file name} of a checkpoint folder."""
    if (folder / INDEX).is_file():
        location = _read_json(folder / INDEX).get("weight_map")
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
    return {name: WEIGHTS for name in _open(folder / WEIGHTS).keys()}


def _open(path: Path):
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is damaged or cut short ({error}): copy or download it again"
        ) from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, sorted, for hashing."""
    return [Path(folder) / name for name in sorted(set(_locate(Path(folder)).values()))]


@dataclass(frozen=True)
class Tensor:
    """A tensor to be written: known by shape and dtype, read only when its file is written."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def save_folder(
    folder: Path,
    *,
    source: Path,
    weights: dict[str, np.ndarray | jax.Array],
    num_layers: int,
    shard_bytes: int = 5 * 2**30,
) -> None:
    """Writes an ordinary Hugging Face folder: config and tokenizer of `source`, new weights.

    Args:
      folder: to be made; must not exist. Written beside and renamed, so it is whole or absent.
      source: the folder that the architecture and the tokenizer come from.
      weights: {parameter path: array}, stacked parameters as [L, ...].
      num_layers: of the model.
      shard_bytes: a file holds at most this much, as far as single tensors allow.

    Raises:
      FileExistsError: `folder` exists.
    """
    tensors = {}
    for path, array in weights.items():
        names = tensor_names(path, num_layers)
        if isinstance(names, str):
            tensors[names] = Tensor(array.shape, array.dtype, partial(np.asarray, array))
            continue
        for layer, name in enumerate(names):
            read = partial(lambda array, layer: np.asarray(array[layer]), array, layer)
            tensors[name] = Tensor(array.shape[1:], array.dtype, read)
    save_tensors(folder, source=source, tensors=tensors, shard_bytes=shard_bytes)


def save_tensors(
    folder: Path, *, source: Path, tensors: dict[str, Tensor], shard_bytes: int = 5 * 2**30
) -> None:
    """As `save_folder`, with {tensor name: Tensor}; at most one file's tensors are in memory."""
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists: choose another output folder or remove it")
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
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
        save_file(arrays, aside / file, metadata={"format": "pt"})
        weight_map.update({name: file for name in shard})
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (aside / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    config = _read_json(Path(source) / "config.json")
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[key] = str(next(iter(tensors.values())).dtype)
    (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    copy_tokenizer(source, aside)
    os.replace(aside, folder)


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint folder as it is stored, read on demand.

    Raises:
      FileNotFoundError, ValueError: as `load_weights`.
    """
    folder = Path(folder)
    location = _locate(folder)
    readers = {file: _open(folder / file) for file in sorted(set(location.values()))}
    tensors = {}
    for name, file in location.items():
        part = readers[file].get_slice(name)
        kind = part.get_dtype()
        if kind not in STORED_DTYPES:
            raise ValueError(f"{folder / file}: tensor {name} has dtype {kind}, not supported")
        read = partial(readers[file].get_tensor, name)
        tensors[name] = Tensor(tuple(part.get_shape()), np.dtype(STORED_DTYPES[kind]), read)
    return tensors


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies the tokenizer's files, and adds `tokenizer.json` where sentencepiece's file is alone.

    Without it other programs would guess how to convert `tokenizer.model`, and differ.
    """
    for name in (*TOKENIZER_FILES, GENERATION):
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, Path(target) / name)
    alone = (Path(source) / tokenizer.SENTENCEPIECE).is_file()
    if alone and not (Path(source) / tokenizer.JSON).is_file():
        load_tokenizer(source).save_pretrained(str(target))


def stop_tokens(folder: Path, tokenizer) -> tuple[int, ...]:
    """Token ids that end an answer: the tokenizer's EOS and those of the folder's files.

    As in transformers, `generation_config.json` counts, and without it `config.json`.
    """
    stops = {tokenizer.eos_token_id}
    for name in (GENERATION, "config.json"):
        path = Path(folder) / name
        if path.is_file():
            listed = _read_json(path).get("eos_token_id")
            listed = listed if isinstance(listed, list) else [] if listed is None else [listed]
            if not all(type(number) is int for number in listed):
                raise ValueError(f"{path}: eos_token_id must be token ids, not {listed}")
            stops |= set(listed)
            break
    return tuple(sorted(stops))


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return value


def as_dtype(name: str):
    """`bfloat16` or `float32` as a dtype; ValueError for others."""
    if name not in ("bfloat16", "float32"):
        raise ValueError(f"precision {name!r} is not supported: choose bfloat16 or float32")
    return jnp.dtype(name)
