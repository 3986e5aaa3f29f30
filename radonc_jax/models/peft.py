"""LoRA adapters in and out of PEFT folders: `adapter_config.json`, `adapter_model.safetensors`.

The arrays have PEFT's shapes already (`a` is lora_A, `b` is lora_B), so an adapter passes through
bit for bit. A setting that this code does not carry out is an error that names it.
"""

import json
import os
import re
import shutil
from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from radonc_jax.models.lora import PROJECTIONS, LoRAConfig
from radonc_jax.parallel import path_name

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT's two wrappers around the transformers model
PARTS = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}

# Keys that are read, or that say nothing of the adapter's arithmetic.
READ = {"r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora"}
INERT = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "loftq_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
}
# Other keys must be empty (null, false, [] or {}) or have the one value given here.
ONLY = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
}


def save_adapter(folder: Path, adapter, config: LoRAConfig, base_model: str) -> None:
    """Writes a PEFT folder.

    Args:
      folder: to be made; must not exist. Written beside and renamed, so it is whole or absent.
      adapter: tree of arrays, as `lora.partition(...).trainable`.
      config: of the adapter.
      base_model: folder or hub id of the base, for `base_model_name_or_path`.

    Raises:
      FileExistsError: `folder` exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists: choose another output folder or remove it")
    tensors = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(adapter):
        array = np.asarray(leaf)
        for name, layer in zip(tensor_names(path_name(path), len(array)), array, strict=True):
            tensors[name] = np.ascontiguousarray(layer)
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_file(tensors, aside / WEIGHTS, metadata={"format": "pt"})
    settings = {
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": config.rank,
        "target_modules": sorted(config.targets),
        "task_type": "CAUSAL_LM",
        "use_dora": config.dora,
        "use_rslora": config.rslora,
    }
    (aside / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    os.replace(aside, folder)


def tensor_names(path: str, num_layers: int) -> list[str]:
    """PEFT's tensors of one stacked adapter array, a name per layer."""
    place, kind = path.rsplit("/", 1)
    module = place.removeprefix("layers/").replace("/", ".")
    return [f"{PREFIX}model.layers.{n}.{module}.{PARTS[kind]}" for n in range(num_layers)]


def read_config(folder: Path) -> LoRAConfig:
    """The adapter's configuration from `adapter_config.json`.

    Raises:
      FileNotFoundError: no `adapter_config.json`.
      ValueError: damaged, another tuner, or a setting that this code does not carry out; named.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a PEFT folder: it has no {CONFIG}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(raw, dict) or "peft_type" not in raw:
        raise ValueError(f"{path} is not a PEFT configuration: it has no peft_type")
    for key, value in raw.items():
        if key in READ or key in INERT:
            continue
        if key in ONLY:
            if value not in ONLY[key]:
                raise ValueError(
                    f"{path}: {key}={value!r} is not supported (only {ONLY[key][0]!r})"
                )
        elif value not in (None, False, [], {}):
            raise ValueError(f"{path}: {key}={value!r} is not supported")
    missing = sorted({"r", "lora_alpha", "target_modules"} - set(raw))
    if missing:
        raise ValueError(f"{path} lacks {missing}")
    for key, kinds in (("r", int), ("lora_alpha", (int, float)), ("lora_dropout", (int, float))):
        if isinstance(raw.get(key, 0), bool) or not isinstance(raw.get(key, 0), kinds):
            raise ValueError(f"{path}: {key} must be a number, not {raw[key]!r}")
    try:
        return LoRAConfig(
            rank=raw["r"],
            alpha=raw["lora_alpha"],
            dropout=raw.get("lora_dropout", 0.0),
            targets=_targets(path, raw["target_modules"]),
            rslora=bool(raw.get("use_rslora", False)),
            dora=bool(raw.get("use_dora", False)),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _targets(path: Path, wanted: list[str] | str) -> tuple[str, ...]:
    """The projections that `target_modules` names: a list of name endings, or one pattern.

    As in PEFT, an entry matches a module's whole name or its ending after a dot, and a pattern its
    whole name. Which layers it matches is settled by the tensors: all of them must be there.
    """
    modules = {name: f"model.layers.0.{parent}.{name}" for name, parent in PROJECTIONS.items()}
    if wanted == "all-linear":
        return tuple(modules)
    if isinstance(wanted, str):
        try:
            found = tuple(name for name, full in modules.items() if re.fullmatch(wanted, full))
        except re.error as error:
            raise ValueError(f"target_modules {wanted!r} is not a pattern: {error}") from None
        if not found:
            raise ValueError(f"target_modules {wanted!r} matches no projection of a first layer")
        return found
    if not isinstance(wanted, list):
        raise ValueError(f"target_modules must be a list or a pattern, not {wanted!r}")
    layer_free = [re.sub(r"^(.*\.)?layers\.\d+\.", "", str(entry)) for entry in wanted]
    unknown = [
        entry
        for entry, ending in zip(wanted, layer_free, strict=True)
        if not any(f".{full}".endswith(f".{ending}") for full in modules.values())
    ]
    if unknown:
        raise ValueError(
            f"target_modules {unknown} cannot take an adapter here (only {list(modules)})"
        )
    return tuple(
        name
        for name, full in modules.items()
        if any(f".{full}".endswith(f".{ending}") for ending in layer_free)
    )


def load_weights(folder: Path, abstract, shardings, num_layers: int):
    """Reads an adapter into placed arrays.

    Args:
      folder: with `adapter_model.safetensors`.
      abstract: shapes of the adapter (`lora.partition(...).trainable`).
      shardings: of the same structure.
      num_layers: of the model.

    Returns:
      A tree of arrays; other floating types than the adapter's own are converted.

    Raises:
      FileNotFoundError: no weights.
      ValueError: a damaged file; a missing, unexpected or misshapen tensor; all are named.
    """
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        pickled = (Path(folder) / "adapter_model.bin").is_file()
        hint = " Pickled adapters are not read: save it as safetensors." if pickled else ""
        raise FileNotFoundError(f"{path} is missing.{hint}")
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is damaged or cut short ({error}): copy or download it again"
        ) from None
    wanted = {
        name: leaf.shape[1:]
        for place, leaf in jax.tree_util.tree_leaves_with_path(abstract)
        for name in tensor_names(path_name(place), num_layers)
    }
    problems = [f"missing tensor {name}" for name in sorted(set(wanted) - set(tensors))]
    problems += [f"unexpected tensor {name}" for name in sorted(set(tensors) - set(wanted))]
    problems += [
        f"tensor {name} has shape {tensors[name].shape}, the model asks {shape}"
        for name, shape in sorted(wanted.items())
        if name in tensors and tensors[name].shape != tuple(shape)
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" * (len(problems) > 8))
        raise ValueError(f"the adapter in {folder} does not fit the model: {shown}")

    def load(place, leaf, sharding):
        names = tensor_names(path_name(place), num_layers)
        array = np.stack([tensors[name] for name in names]).astype(leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: array[index])

    return jax.tree_util.tree_map_with_path(load, abstract, shardings)
