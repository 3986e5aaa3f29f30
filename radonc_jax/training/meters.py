"""What a step costs and what the device could do: for the meters of a run and for forecasts.

Peaks and memory sizes are the vendors' datasheet values; a device that is not listed has none, and
figures that need one are left out.
"""

import resource
import sys
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from radonc_jax.models.decoder import ModelConfig

# (part of the device's name, dense bfloat16 FLOP/s, GiB of memory); the first match counts.
DEVICES = (
    ("H200", 989e12, 141),
    ("H100 PCIe", 756e12, 80),
    ("H100", 989e12, 80),
    ("A100", 312e12, None),
    ("L40S", 362e12, 48),
    ("TPU v6 lite", 918e12, 32),
    ("TPU v5 lite", 197e12, 16),
    ("TPU v5", 459e12, 95),
    ("TPU v4", 275e12, 32),
)


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device; None where it is not known."""
    return next((peak for name, peak, _ in DEVICES if name in device_kind), None)


def memory_bytes(device: jax.Device) -> int | None:
    """Memory that a program may use on a device; None where it is not known.

    What the runtime says, else the datasheet (a device that is only compiled for), else, for a
    CPU, this device's share of what the host has free.
    """
    if device.platform == "cpu":
        try:
            with open("/proc/meminfo", encoding="ascii") as file:
                sizes = dict(line.split(":") for line in file)
        except OSError:
            return None
        return int(sizes["MemAvailable"].split()[0]) * 1024 // jax.local_device_count()
    try:
        limit = (device.memory_stats() or {}).get("bytes_limit")
    except (RuntimeError, NotImplementedError):  # not a device at hand
        limit = None
    if limit:
        return limit
    size = next((size for name, _, size in DEVICES if name in device.device_kind), None)
    return None if size is None else size * 2**30


def peak_memory_bytes() -> int | None:
    """The most memory in use so far: of the fullest local device, or of this process on a CPU.

    None where a device does not tell.
    """
    devices = jax.local_devices()
    if devices[0].platform != "cpu":
        used = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices]
        return max((size for size in used if size is not None), default=None)
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return rss if sys.platform == "darwin" else rss * 1024


def matmul_parameters(config: ModelConfig) -> int:
    """Weights that a token is multiplied with: all but the embedding table and the norms."""
    c = config
    attention = c.hidden_size * c.head_dim * 2 * (c.num_heads + c.num_kv_heads)
    mlp = 3 * c.hidden_size * c.intermediate_size
    return c.num_layers * (attention + mlp) + c.vocab_size * c.hidden_size


def parameters(config: ModelConfig) -> int:
    """All weights."""
    c = config
    norms = (2 * c.num_layers + 1) * c.hidden_size
    embedding = 0 if c.tie_word_embeddings else c.vocab_size * c.hidden_size
    return matmul_parameters(config) + embedding + norms


def kept_bytes(config: ModelConfig, dtype) -> int:
    """What a token leaves for the backward pass of all layers where no product with the weights
    runs twice: query, key, value, attention and its log-sum-exp, residual, gate and up."""
    c = config
    heads = 2 * (c.num_heads + c.num_kv_heads) * c.head_dim
    wide = heads + c.hidden_size + 2 * c.intermediate_size
    return c.num_layers * (wide * jnp.dtype(dtype).itemsize + 4 * c.num_heads)


def flops_per_token(config: ModelConfig, *, full: bool) -> float:
    """Model FLOPs of a trained token by the 4 N convention.

    Forward 2 N and backward 2 N for the activations alone, since a frozen base has no gradient of
    its own; 6 N when the whole model trains. N is `matmul_parameters`. Attention and the adapter
    are not counted, nor is anything that is computed twice; work that is spared (the head and the
    last layer run at answer positions only) is counted all the same.
    """
    return (6.0 if full else 4.0) * matmul_parameters(config)


def attention_cost(config: ModelConfig) -> float:
    """What attending to one more place costs a token, as a share of its products with weights.

    Two products of N heads by H forward and five backward (one of them computed again), 2 FLOPs
    each, against 4 N_mm.
    """
    per_place = 14.0 * config.num_layers * config.num_heads * config.head_dim
    return per_place / (4.0 * matmul_parameters(config))


def measured_flops(dtype, size: int = 1024) -> float:
    """FLOP/s of a square matrix product here, the best of a few."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((size, size)), dtype)
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        product(x).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 / best


class Pace:
    """Tokens a second of each step, from the end of the one before or from `restart`.

    Args:
      now: seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self._now = now
        self.restart()

    def restart(self) -> None:
        """What was done since the last step, such as a validation or a checkpoint, is no part of
        the next one."""
        self._then = self._now()

    def step(self, tokens: int) -> float:
        """The pace of a step that has just ended."""
        then, self._then = self._then, self._now()
        return tokens / (self._then - then)


def mfu(
    useful_tokens_per_second: float, per_token: float, devices: Sequence[jax.Device]
) -> float | None:
    """Model FLOPs utilisation: the share of the devices' peak that useful tokens account for."""
    peak = peak_flops(devices[0].device_kind)
    if peak is None:
        return None
    return useful_tokens_per_second * per_token / (peak * len(devices))
