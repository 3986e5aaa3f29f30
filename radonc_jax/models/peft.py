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
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from radonc_jax.models import weight_files
from radonc_jax.models.lora import PROJECTIONS, LoRAConfig
from radonc_jax.parallel import path_name

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT's two wrappers around the transformers model
# Types that float32 holds exactly.
STORED_DTYPES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(jnp.bfloat16))
PARTS = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}

# Keys that are read, or that say nothing of the adapter's arithmetic.
READ = {
    "alpha_pattern",
    "exclude_modules",
    "lora_alpha",
    "lora_dropout",
    "r",
    "rank_pattern",
    "target_modules",
    "use_dora",
    "use_rslora",
}
INERT = {
    "auto_mapping",  # the base's class, where it has no task
    "base_model_name_or_path",
    "inference_mode",
    "loftq_config",  # read by PEFT with init_lora_weights="loftq" only, which is refused
    "megatron_core",  # read with megatron_config only, which is refused
    "peft_version",
    "qalora_group_size",  # read with use_qalora only, which is refused
    "revision",
    "runtime_config",
}
# Other keys must be empty (null, false, "", [] or {}) or have one of the values given here. How a
# trained adapter was initialised does not matter, unless that changed its base as well.
ONLY = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
}


def save_adapter(
    folder: Path, adapter, config: LoRAConfig, base_model: str, revision: str | None = None
) -> None:
    """Writes a PEFT folder.

    Args:
      folder: to be made; must not exist. Written beside and renamed, so it is whole or absent.
      adapter: tree of arrays, as `lora.partition(...).trainable`.
      config: of the adapter.
      base_model: folder or hub id of the base, for `base_model_name_or_path`.
      revision: of the base on the hub.

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
    weight_files.as_readable_as_others(aside / WEIGHTS)
    settings = {
        "base_model_name_or_path": base_model,
        "revision": revision,
        "alpha_pattern": {name: _plain(alpha) for name, alpha in config.alpha_pattern},
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _plain(config.alpha),
        "lora_dropout": config.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": config.rank,
        "rank_pattern": dict(config.rank_pattern),
        "target_modules": sorted(config.targets),
        "task_type": "CAUSAL_LM",
        "use_dora": config.dora,
        "use_rslora": config.rslora,
    }
    (aside / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    os.replace(aside, folder)


def _plain(alpha: float) -> int | float:
    """A whole alpha as an int: PEFT's type, and that of programs stricter than PEFT."""
    return int(alpha) if alpha == int(alpha) else alpha


def tensor_names(path: str, num_layers: int) -> list[str]:
    """PEFT's tensors of one stacked adapter array, a name per layer."""
    place, kind = path.rsplit("/", 1)
    module = place.removeprefix("layers/").replace("/", ".")
    return [f"{PREFIX}model.layers.{n}.{module}.{PARTS[kind]}" for n in range(num_layers)]


def read_config(folder: Path, num_layers: int) -> LoRAConfig:
    """The adapter's configuration from `adapter_config.json`.

    Patterns of module names are matched as PEFT matches them, against every layer. An adapter here
    is the same in all layers: a setting that treats layers differently is an error.

    Args:
      folder: of the adapter.
      num_layers: of the base.

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
        elif not (value is None or value is False or value in ([], {}, "")):
            raise ValueError(f"{path}: {key}={value!r} is not supported")
    missing = sorted({"r", "lora_alpha", "target_modules"} - set(raw))
    if missing:
        raise ValueError(f"{path} lacks {missing}")
    for key, kinds in (("r", int), ("lora_alpha", (int, float)), ("lora_dropout", (int, float))):
        if isinstance(raw.get(key, 0), bool) or not isinstance(raw.get(key, 0), kinds):
            raise ValueError(f"{path}: {key} must be a number, not {raw[key]!r}")
    for key in ("use_rslora", "use_dora"):
        if not isinstance(raw.get(key, False), bool):
            raise ValueError(f"{path}: {key} must be true or false, not {raw[key]!r}")
    try:
        targets = _targets(raw["target_modules"], raw.get("exclude_modules"), num_layers)
        return LoRAConfig(
            rank=raw["r"],
            alpha=raw["lora_alpha"],
            dropout=raw.get("lora_dropout", 0.0),
            targets=targets,
            rslora=raw.get("use_rslora", False),
            dora=raw.get("use_dora", False),
            rank_pattern=_pattern("rank_pattern", raw, raw["r"], targets, num_layers),
            alpha_pattern=_pattern("alpha_pattern", raw, raw["lora_alpha"], targets, num_layers),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _modules(projection: str, num_layers: int) -> list[str]:
    """The names that transformers gives one projection, a name per layer."""
    parent = PROJECTIONS[projection]
    return [f"model.layers.{layer}.{parent}.{projection}" for layer in range(num_layers)]


def _targets(wanted, excluded, num_layers: int) -> tuple[str, ...]:
    """The projections that `target_modules` names and `exclude_modules` does not."""
    if wanted in (None, []):
        raise ValueError("target_modules names nothing, so there is no adapter")
    everything = isinstance(wanted, str) and wanted.lower() == "all-linear"
    included = _matcher("target_modules", r".*_proj" if everything else wanted)
    excluded = _matcher("exclude_modules", [] if excluded is None else excluded)
    if not everything:
        others = [
            name
            for name in ("lm_head", "model.embed_tokens")
            if included(name) and not excluded(name)
        ]
        if isinstance(wanted, list):
            known = [name for projection in PROJECTIONS for name in _modules(projection, 1)]
            endings = [re.sub(r"^(.*\.)?layers\.\d+\.", "", str(entry)) for entry in wanted]
            others += [
                entry
                for entry, ending in zip(wanted, endings, strict=True)
                if not any(f".{name}".endswith(f".{ending}") for name in known)
            ]
        if others:
            raise ValueError(
                f"target_modules names {sorted(set(others))}, which cannot take an adapter here "
                f"(only {list(PROJECTIONS)})"
            )
    targets = []
    for projection in PROJECTIONS:
        names = _modules(projection, num_layers)
        layers = [n for n, name in enumerate(names) if included(name) and not excluded(name)]
        if layers and len(layers) < num_layers:
            raise ValueError(
                f"target_modules with exclude_modules puts {projection} on the layers {layers} "
                f"only, which is not supported (all {num_layers}, or none)"
            )
        if layers:
            targets.append(projection)
    if not targets:
        raise ValueError(f"target_modules {wanted!r} leaves no projection of the model")
    return tuple(targets)


def _matcher(key: str, wanted):
    """Whether a module's name is meant: PEFT's `check_target_module_exists`.

    A string is a pattern of the whole name; an entry of a list is a whole name, or its ending
    after a dot.
    """
    if isinstance(wanted, str):
        try:
            pattern = re.compile(wanted)
        except re.error as error:
            raise ValueError(f"{key} {wanted!r} is not a pattern: {error}") from None
        return lambda name: pattern.fullmatch(name) is not None
    if not isinstance(wanted, list) or not all(isinstance(entry, str) for entry in wanted):
        raise ValueError(f"{key} must be a list of names or a pattern, not {wanted!r}")
    return lambda name: any(f".{name}".endswith(f".{entry}") for entry in wanted)


def _pattern(key: str, raw: dict, default, targets, num_layers: int) -> dict:
    """`rank_pattern` or `alpha_pattern` as {projection: value}: PEFT's `get_pattern_key`.

    The first entry counts that, as a pattern, is the whole name or its ending after a dot.
    """
    given = raw.get(key)
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise ValueError(f"{key} must map module names to numbers, not {given!r}")
    patterns = {}
    for entry in given:
        try:
            patterns[entry] = re.compile(rf"(.*\.)?({entry})$")
        except re.error as error:
            raise ValueError(f"{key} {entry!r} is not a pattern: {error}") from None
    values = {}
    for projection in targets:
        found = [
            next((given[entry] for entry in patterns if patterns[entry].match(name)), default)
            for name in _modules(projection, num_layers)
        ]
        if any(value != found[0] for value in found):
            raise ValueError(
                f"{key} {given!r} gives {projection} other values in other layers, "
                "which is not supported"
            )
        values[projection] = found[0]
    return values


def load_weights(folder: Path, abstract, shardings, num_layers: int):
    """Reads an adapter into placed arrays.

    Args:
      folder: with `adapter_model.safetensors`.
      abstract: shapes of the adapter (`lora.partition(...).trainable`).
      shardings: of the same structure.
      num_layers: of the model.

    Returns:
      A tree of float32 arrays, which hold values stored in bfloat16 or float16 exactly.

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
    for name, shape in sorted(wanted.items()):
        if name not in tensors:
            continue
        if tensors[name].shape != tuple(shape):
            problems.append(
                f"tensor {name} has shape {tensors[name].shape}, the model asks {shape}"
            )
        if tensors[name].dtype not in STORED_DTYPES:
            problems.append(f"tensor {name} has dtype {tensors[name].dtype}")
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" * (len(problems) > 8))
        raise ValueError(f"the adapter in {folder} does not fit the model: {shown}")

    def load(place, leaf, sharding):
        names = tensor_names(path_name(place), num_layers)
        array = np.stack([tensors[name] for name in names]).astype(leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: array[index])

    return jax.tree_util.tree_map_with_path(load, abstract, shardings)
