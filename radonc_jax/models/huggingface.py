"""Hugging Face folders in and out: `config.json` and tokenizer; `weight_files` has the weights.

Local folders touch no network; a hub id is looked up in the local cache first.
"""

import json
import os
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from radonc_jax.models import tokenizer, weight_files
from radonc_jax.models.decoder import Llama3RopeScaling, ModelConfig
from radonc_jax.models.hub import GENERATION, TOKENIZER_FILES
from radonc_jax.models.hub import resolve as resolve
from radonc_jax.models.tokenizer import load_tokenizer as load_tokenizer

FAMILIES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
SHARD_BYTES = 2 * 2**30  # of a file of weights; a whole one is in memory while it is written
# Settings that are absent, null, or have the one value that this code carries out.
REQUIRED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0,
    "mlp_bias": False,
    "quantization_config": None,
    "partial_rotary_factor": 1,
    "layer_types": None,
    "num_local_experts": None,
    "num_experts": None,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
}


def read_config(folder: Path) -> ModelConfig:
    """The architecture from `config.json`.

    Keys that transformers may leave out take the meaning that their absence has there: the number
    of key/value heads (those of the queries; 8 for Mistral), the head size (hidden size over
    heads), rope theta 10000, Mistral's window of 4096 (null for none), an untied head.

    Raises:
      FileNotFoundError: no `config.json`.
      ValueError: another family, a missing or misshapen key, or a setting that this code does not
        carry out.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: is {folder} a Hugging Face model folder?")
    raw = weight_files.read_json(path)
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"{path}: model_type {family!r} is not supported; this code runs {list(FAMILIES)}"
        )
    architectures = raw.get("architectures")
    if architectures is not None and FAMILIES[family] not in architectures:
        raise ValueError(
            f"{path}: architectures {architectures} is not supported (only {FAMILIES[family]})"
        )
    for key, value in REQUIRED.items():
        if raw.get(key) is not None and raw[key] != value:
            raise ValueError(f"{path}: {key}={raw[key]!r} is not supported (only {value!r})")

    def read(key, kind, default=None):
        value = raw.get(key)
        if value is None:
            if default is None:
                raise ValueError(f"{path}: the key {key!r} is missing")
            return default
        if isinstance(value, bool) != (kind is bool) or not isinstance(value, (kind, int)):
            raise ValueError(f"{path}: {key} must be of type {kind.__name__}, not {value!r}")
        if kind is not bool and value <= 0:
            raise ValueError(f"{path}: {key} must be positive, not {value!r}")
        return kind(value)

    heads = read("num_attention_heads", int)
    hidden = read("hidden_size", int)
    context = read("max_position_embeddings", int)
    theta = read("rope_theta", float, 10000.0)
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{path}: rope settings must be a mapping, not {rope!r}")
    window = None
    if family == "mistral" and raw.get("sliding_window", 4096) is not None:
        window = read("sliding_window", int, 4096)
    elif family == "llama" and raw.get("sliding_window") is not None:
        raise ValueError(f"{path}: sliding_window is not supported in a llama model")
    if "head_dim" not in raw and hidden % heads:
        raise ValueError(f"{path}: hidden_size {hidden} does not divide by {heads} heads")
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
        rope_theta=_rope_theta(path, rope, theta),
        rope_scaling=_rope_scaling(path, rope, context),
        sliding_window=window,
        tie_word_embeddings=read("tie_word_embeddings", bool, False),
        max_position_embeddings=context,
    )


def _rope_theta(path: Path, rope: dict, default: float) -> float:
    theta = rope.get("rope_theta", default)
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or theta <= 0:
        raise ValueError(f"{path}: rope_theta must be a positive number, not {theta!r}")
    return float(theta)


def _rope_scaling(path: Path, rope: dict, context: int) -> Llama3RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
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
    missing = [name for name in names[:3] if name not in rope]
    if missing:
        raise ValueError(f"{path}: rope type 'llama3' needs {missing}")
    values = {name: rope.get(name, context) for name in names}
    return Llama3RopeScaling(**values)


def save_folder(
    folder: Path,
    *,
    source: Path,
    weights: dict[str, np.ndarray | jax.Array],
    num_layers: int,
    shard_bytes: int = SHARD_BYTES,
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
        names = weight_files.tensor_names(path, num_layers)
        if isinstance(names, str):
            tensors[names] = weight_files.Tensor(
                array.shape, array.dtype, partial(np.asarray, array)
            )
            continue
        for layer, name in enumerate(names):
            read = partial(lambda array, layer: np.asarray(array[layer]), array, layer)
            tensors[name] = weight_files.Tensor(array.shape[1:], array.dtype, read)
    save_tensors(folder, source=source, tensors=tensors, shard_bytes=shard_bytes)


def save_tensors(
    folder: Path,
    *,
    source: Path,
    tensors: dict[str, weight_files.Tensor],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """As `save_folder`, with {tensor name: Tensor}, each read when its file is written."""
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists: choose another output folder or remove it")
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    weight_files.write_shards(aside, tensors, shard_bytes)
    config = weight_files.read_json(Path(source) / "config.json")
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[key] = str(next(iter(tensors.values())).dtype)
    (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    copy_tokenizer(source, aside)
    os.replace(aside, folder)


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
            listed = weight_files.read_json(path).get("eos_token_id")
            listed = listed if isinstance(listed, list) else [] if listed is None else [listed]
            if not all(type(number) is int for number in listed):
                raise ValueError(f"{path}: eos_token_id must be token ids, not {listed}")
            stops |= set(listed)
            break
    return tuple(sorted(stops))


def as_dtype(name: str):
    """`bfloat16` or `float32` as a dtype; ValueError for others."""
    if name not in ("bfloat16", "float32"):
        raise ValueError(f"precision {name!r} is not supported: choose bfloat16 or float32")
    return jnp.dtype(name)
