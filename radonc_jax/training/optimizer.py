"""AdamW with warm-up, decay and clipping, from Optax; LoRA+ on top."""

from dataclasses import dataclass

import jax
import optax

from radonc_jax.parallel import path_name

SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimiser settings.

    Attributes:
      learning_rate: at the end of the warm-up.
      schedule: "cosine" or "linear" decay to zero over the run, or "constant".
      warmup_fraction: share of the steps in which the rate rises linearly from zero.
      weight_decay: decoupled (Loshchilov and Hutter 2019, arXiv 1711.05101).
      clip_norm: gradients are scaled down to this global norm; 0 turns clipping off.
      b1, b2: decay of Adam's moments.
      loraplus_ratio: LoRA+ (Hayou et al. 2024, arXiv 2402.12354): the adapter's B, and with DoRA
        its magnitudes, learn at this many times the rate of A, as in PEFT; 1 turns it off.
    """

    learning_rate: float
    schedule: str
    warmup_fraction: float
    weight_decay: float
    clip_norm: float
    b1: float
    b2: float
    loraplus_ratio: float = 1.0

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise ValueError(f"optimizer.schedule must be one of {SCHEDULES}: {self.schedule!r}")
        if not 0 <= self.warmup_fraction < 1:
            raise ValueError(
                f"optimizer.warmup_fraction must be in [0, 1), not {self.warmup_fraction}"
            )
        if self.learning_rate <= 0:
            raise ValueError(f"optimizer.learning_rate must be positive: {self.learning_rate}")
        if self.loraplus_ratio <= 0:
            raise ValueError(f"optimizer.loraplus_ratio must be positive: {self.loraplus_ratio}")


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step, counted from 0, for a run of `steps`."""
    warmup = int(config.warmup_fraction * steps)
    rate = config.learning_rate
    decay_steps = max(steps - warmup, 1)
    if config.schedule == "cosine":
        decay = optax.cosine_decay_schedule(rate, decay_steps)
    elif config.schedule == "linear":
        decay = optax.linear_schedule(rate, 0.0, decay_steps)
    else:
        decay = optax.constant_schedule(rate)
    if not warmup:
        return decay
    # The first step already moves: rates are (s + 1) / warmup of the full one.
    rise = optax.linear_schedule(rate / warmup, rate, max(warmup - 1, 1))
    return optax.join_schedules([rise, decay], [warmup])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The update rule for a run of `steps` optimiser steps."""
    parts = [
        optax.adamw(
            make_schedule(config, steps),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
        )
    ]
    if config.clip_norm:
        parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
    if config.loraplus_ratio != 1:
        parts.append(_loraplus(config.loraplus_ratio))
    return optax.chain(*parts) if len(parts) > 1 else parts[0]


def _loraplus(ratio: float) -> optax.GradientTransformation:
    """Multiplies the updates of B and of magnitudes, weight decay included: a rate of their own."""

    def scale(path, update):
        faster = path_name(path).rsplit("/", 1)[-1] in ("b", "magnitude")
        return ratio * update if faster else update

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scale, updates))
