"""A run's settings: the ConfigDict of `configs/*.py` as frozen dataclasses.

Each section belongs to the module that uses it; what has no other home is defined here.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import MISSING, dataclass

from radonc_jax.data.batches import BatchConfig
from radonc_jax.decoding.constrain import CODES
from radonc_jax.models.attention import BACKENDS
from radonc_jax.models.decoder import SAVED_NAMES
from radonc_jax.models.lora import LoRAConfig
from radonc_jax.models.quantize import KINDS
from radonc_jax.parallel import MeshConfig
from radonc_jax.tasks import select
from radonc_jax.training.optimizer import OptimizerConfig

METRICS = {"loss": -1, "accuracy": 1, "rouge1": 1, "f1_macro": 1}  # sign: is more better?


FLOATS = ("bfloat16", "float32")


@dataclass(frozen=True)
class PrecisionConfig:
    """Number types.

    Attributes:
      compute: of activations and products, "bfloat16" or "float32".
      base: of the frozen weights: a floating type, or "int8" or "nf4" for the layers' projections;
        then the embedding, the head and the norms are kept as `compute` says.
    """

    compute: str
    base: str

    def __post_init__(self):
        if self.compute not in FLOATS:
            raise ValueError(f"precision.compute must be one of {FLOATS}, not {self.compute!r}")
        if self.base not in (*FLOATS, *KINDS):
            raise ValueError(f"precision.base must be one of {(*FLOATS, *KINDS)}: {self.base!r}")

    @property
    def quantized(self) -> str | None:
        """ "int8" or "nf4"; None for a base in floating point."""
        return self.base if self.base in KINDS else None

    @property
    def stored(self) -> str:
        """Floating type of the weights that are not quantised."""
        return self.base if self.base in FLOATS else self.compute


@dataclass(frozen=True)
class TrainConfig:
    """The loop.

    Attributes:
      epochs: passes over the training split.
      steps: optimiser steps; 0 to go by epochs.
      log_every: steps between lines in the terminal and in TensorBoard; `metrics.jsonl` has all.
      evaluate_every: steps between validations; 0 for one at the end only.
      save_every: steps between checkpoints; 0 for one at each validation only.
      patience: validations without improvement after which the run stops; 0 never stops it.
      metric: that chooses the best checkpoint: "loss", or one of generated answers: "accuracy",
        "rouge1", "f1_macro" (averaged over tasks).
      validation_cases: how many validation cases are answered for it, the first ones; 0 for all.
      attention: of packed rows: "xla"; "cudnn_packed" or "cudnn" (NVIDIA), or "splash" (TPU), which
        must pass a test at the start; "auto" for the platform's own if it passes, else "xla".
      recompute: what the backward pass computes again to save memory: "nothing", "mlp" (gate and
        up projections) or "layer" (all of a layer).
    """

    epochs: int
    steps: int
    log_every: int
    evaluate_every: int
    save_every: int
    patience: int
    metric: str
    validation_cases: int
    attention: str = "auto"
    recompute: str = "nothing"

    def __post_init__(self):
        if self.attention not in ("auto", *BACKENDS):
            raise ValueError(
                f"train.attention must be one of {('auto', *BACKENDS)}, not {self.attention!r}"
            )
        if self.recompute not in SAVED_NAMES:
            raise ValueError(
                f"train.recompute must be one of {tuple(SAVED_NAMES)}, not {self.recompute!r}"
            )
        if self.metric not in METRICS:
            raise ValueError(f"train.metric must be one of {list(METRICS)}, not {self.metric!r}")
        if self.epochs < 1 and self.steps < 1:
            raise ValueError("one of train.epochs and train.steps must be at least 1")
        if self.log_every < 1:
            raise ValueError(f"train.log_every must be at least 1, not {self.log_every}")


@dataclass(frozen=True)
class DecodeConfig:
    """Greedy decoding.

    Attributes:
      batch: rows decoded together.
      max_new_tokens: longest answer, the stop token included.
      constrained: whether the final evaluation of `train` also lets the models answer from closed
        sets (modality by its labels, ICD-10-CM by a trie of codes), in folders of their own: "" for
        no, "table" for the codes of the code table, "cohort" for those of the cohort.
    """

    batch: int
    max_new_tokens: int
    constrained: str = ""

    def __post_init__(self):
        if self.constrained not in ("", *CODES):
            raise ValueError(
                f"decode.constrained must be one of {('', *CODES)}, not {self.constrained!r}"
            )


@dataclass(frozen=True)
class Settings:
    """All of a run's settings; see the README for each key."""

    task: str
    model: str
    cohort: str
    seed: int
    trainable: str
    final_evaluation: bool
    lora: LoRAConfig
    precision: PrecisionConfig
    batch: BatchConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    mesh: MeshConfig
    decode: DecodeConfig

    def __post_init__(self):
        tasks = select(self.task)
        if self.trainable not in ("lora", "full"):
            raise ValueError(f'trainable must be "lora" or "full", not {self.trainable!r}')
        if self.trainable == "full" and self.precision.base != "float32":
            raise ValueError(
                'trainable="full" trains float32 weights: set precision.base="float32"'
            )
        if self.trainable == "full" and (self.lora.init_from or self.optimizer.loraplus_ratio != 1):
            raise ValueError(
                'trainable="full" has no adapter: leave lora.init_from empty and '
                "optimizer.loraplus_ratio at 1"
            )
        if self.task == "regimen" and self.train.metric == "f1_macro":
            raise ValueError(
                'free-text regimens have no F1: set train.metric to "accuracy", "rouge1" or "loss"'
            )
        if tasks[0].name == "text":
            if self.train.metric != "loss" or self.final_evaluation:
                raise ValueError(
                    'task="text" has no questions to answer: set train.metric="loss" and '
                    "final_evaluation=False"
                )

    @property
    def adapter(self) -> LoRAConfig | None:
        """The adapter's configuration, or None when the whole model trains."""
        return self.lora if self.trainable == "lora" else None

    def as_dict(self) -> dict:
        """As `from_mapping` reads it; patterns are mappings again."""
        values = dataclasses.asdict(self)
        for name in ("rank_pattern", "alpha_pattern"):
            values["lora"][name] = dict(values["lora"][name])
        return values


def from_mapping(mapping: Mapping) -> Settings:
    """Settings from a ConfigDict's `to_dict()` or a run's `config.json`.

    Raises:
      ValueError: an unknown or missing key, named with its section, or a value out of range.
    """
    fields = {field.name: field.type for field in dataclasses.fields(Settings)}
    _check_keys("config", mapping, fields)
    values = {}
    for name, kind in fields.items():
        value = mapping[name]
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, Mapping):
                raise ValueError(f"config.{name} must be a section, not {value!r}")
            known = dataclasses.fields(kind)
            # Runs from before a key was there can still be read.
            value = {f.name: f.default for f in known if f.default is not MISSING} | dict(value)
            _check_keys(f"config.{name}", value, [f.name for f in known])
            value = kind(**value)
        values[name] = value
    return Settings(**values)


def _check_keys(place: str, mapping: Mapping, expected) -> None:
    unknown = sorted(set(mapping) - set(expected))
    missing = sorted(set(expected) - set(mapping))
    if unknown:
        raise ValueError(f"{place} has unknown keys {unknown}; it knows {sorted(expected)}")
    if missing:
        raise ValueError(f"{place} lacks the keys {missing}")
