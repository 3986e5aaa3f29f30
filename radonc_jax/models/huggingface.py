"""Hugging Face folders in and out: `config.json` and tokenizer; `weight_files` has the weights.

Local folders touch no network; a hub id is looked up in the local cache first.
"""

import json
import math
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


def read_architecture(folder: Path) -> str:
    """The architecture's name, of a folder that `read_config` has read."""
    raw = weight_files.read_json(Path(folder) / "config.json")
    return FAMILIES[raw["model_type"]]


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
    raw = weight_files.read_json(path)
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
