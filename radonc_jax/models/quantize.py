"""Frozen kernels in 8 or 4 bits, through qwix's arrays.

`replace` puts `QuantizedLinear` in the place of every projection of the layers; adapters wrap it as
they wrap a plain `Linear`. Embedding, head and norms stay floating point, as in QLoRA (Dettmers et
al. 2023, arXiv 2305.14314). Arithmetic is floating point throughout: a kernel is turned back, layer
by layer, when it is used.

Scales belong to tiles of at most 64 weights along the input axis, such that eight devices can share
the axis. So a kernel can be split over devices, or quantised row by row while it is read, with the
very same result.
"""

import math

import jax
import jax.numpy as jnp
import qwix
from flax import nnx

from radonc_jax.models.decoder import PROJECTIONS, Decoder, Linear

KINDS = ("int8", "nf4")
TILE, SMALLEST_TILE = 64, 8
PACKED = {"int8": 1, "nf4": 2}  # codes a byte


def tile_size(in_size: int) -> int:
    """Weights that share a scale; ValueError for a size that cannot be quantised well.

    Of LLaMA-2-7B's 11008 inputs to `down_proj` 32, so that they can be split into eight; elsewhere
    in the families that this code runs 64.
    """
    tile = math.gcd(in_size // 8, TILE) if in_size % 8 == 0 else 0
    if tile < SMALLEST_TILE:  # a small model is not split into eight
        tile = math.gcd(in_size, TILE)
    if tile < SMALLEST_TILE:
        raise ValueError(
            f"an input size of {in_size} has no tiles of at least {SMALLEST_TILE} weights that "
            'divide it, so a quantised base does not suit this model: set precision.base="bfloat16"'
        )
    return tile


def encode(kernel: jax.Array, kind: str, tile: int) -> dict[str, jax.Array]:
    """Quantises rows of kernels.

    Args:
      kernel: floating [..., in], whole tiles.
      kind: "int8" (symmetric, by the tile's largest magnitude) or "nf4" (QLoRA's 4-bit normal
        float).
      tile: weights that share a scale.

    Returns:
      codes int8 [..., in], or uint8 [..., in / 2] with two codes a byte; scales float32
      [..., in / tile].
    """
    rows = kernel.astype(jnp.float32).reshape(-1, kernel.shape[-1])
    array = qwix.quantize(
        rows,
        jnp.int8 if kind == "int8" else kind,
        channelwise_axes=[0],
        tiled_axes={1: tile},
    )
    codes, scales = array.qvalue, array.scale
    if kind == "nf4":
        # A tile's first half in the low bits, its second half in the high ones: whole tiles stay
        # whole bytes, and no neighbours have to be interleaved again.
        low, high = jnp.split(codes.astype(jnp.uint8).reshape(len(rows), -1, tile), 2, axis=-1)
        codes = (low | high << 4).reshape(len(rows), -1)
    return {
        "codes": codes.reshape(*kernel.shape[:-1], -1),
        "scales": scales.reshape(*kernel.shape[:-1], -1),
    }


def decode(codes: jax.Array, scales: jax.Array) -> jax.Array:
    """The kernel that codes stand for, float32 [..., in]; arguments as `encode` returns them."""
    qtype = jnp.int8
    if codes.dtype == jnp.uint8:
        tiles = codes.reshape(*scales.shape, -1)
        codes = jnp.concatenate([tiles & 15, tiles >> 4], axis=-1)
        codes = codes.reshape(*scales.shape[:-1], -1)
        qtype = "nf4"
    return qwix.dequantize(qwix.QArray(codes, scales, None, qtype))


def kernel_shape(codes) -> tuple[int, ...]:
    """Shape of the kernel that codes [..., in or in / 2] stand for."""
    kind = "nf4" if codes.dtype == jnp.uint8 else "int8"
    return (*codes.shape[:-1], codes.shape[-1] * PACKED[kind])


class QuantizedLinear(Linear):
    """A linear map whose kernel is kept as codes and scales; never trained."""

    def __init__(self, shape: tuple[int, int, int], kind: str):
        layers, out_size, in_size = self.shape = shape
        tile = tile_size(in_size)
        dtype = jnp.int8 if kind == "int8" else jnp.uint8
        self.codes = nnx.Param(jnp.zeros((layers, out_size, in_size // PACKED[kind]), dtype))
        self.scales = nnx.Param(jnp.ones((layers, out_size, in_size // tile)))

    def weight(self, dtype) -> jax.Array:
        return decode(self.codes[...], self.scales[...]).astype(dtype)


def replace(model: Decoder, kind: str) -> Decoder:
    """Puts quantised projections in the place of the plain ones, in place.

    Raises:
      ValueError: an unknown kind, or a size that does not suit it.
    """
    if kind not in KINDS:
        raise ValueError(f"quantised weights are {' or '.join(KINDS)}, not {kind!r}")
    for name, parent in PROJECTIONS.items():
        place = getattr(model.layers, parent)
        setattr(place, name, QuantizedLinear(getattr(place, name).shape, kind))
    return model
