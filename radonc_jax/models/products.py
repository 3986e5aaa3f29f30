"""Matrix products whose result is right whatever the device, the neighbours and the number of rows.

Three things that `jnp.einsum` leaves to the platform are settled here: how many bits float32 is
multiplied in, in which order a sum is added up, and which factor stands on the left.
"""

import functools

import jax
import jax.numpy as jnp

# A CPU's product has each of its numbers added up in the same order, whatever others there are,
# if its columns are a multiple of a vector's length; with fewer the kernel depends on the rows.
COLUMNS = 16


def matmul_precision(dtype) -> jax.lax.Precision | None:
    """float32 means float32: without this, GPUs and TPUs multiply float32 in fewer bits."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def ordered_sum(x: jax.Array) -> jax.Array:
    """Sum over the last axis, which stays with size one; on a CPU zeros at its end change no bit.

    On a CPU a matrix product, because XLA's reductions there add in an order that depends on how
    many rows there are, and its products do not: in float32 a row's sum is the same beside any
    others. On GPUs a reduction: on an H200 such products took a fifteenth of a decode step.
    """

    def plain(x):
        return jnp.sum(x, axis=-1, keepdims=True)

    def product(x):
        ones = jnp.ones((x.shape[-1], COLUMNS), x.dtype)
        sums = jnp.einsum("...S,SO->...O", x, ones, precision=jax.lax.Precision.HIGHEST)
        return sums[..., :1]

    if x.dtype != jnp.float32:
        return plain(x)
    return jax.lax.platform_dependent(x, cuda=plain, rocm=plain, default=product)


def few_rows(x: jax.Array, large: jax.Array, preferred_element_type=None) -> jax.Array:
    """x large^T, where `large` has far more rows than `x`: what a decode step multiplies.

    A CPU's libraries lay the right factor out anew for each product, which costs more than a
    product of few rows itself; there the large one stands on the left, as it lies in memory.

    Args:
      x: [..., R, I].
      large: [..., O, I]; the leading dimensions are those of `x`.
      preferred_element_type: of the sums and of the result; None for that of the factors.

    Returns:
      [..., R, O].
    """
    multiply = functools.partial(
        jnp.einsum,
        precision=matmul_precision(x.dtype),
        preferred_element_type=preferred_element_type,
    )

    def plain(x, large):
        return multiply("...RI,...OI->...RO", x, large)

    def turned(x, large):
        rows = x.shape[-2]
        filler = [(0, 0)] * (x.ndim - 2) + [(0, -rows % COLUMNS), (0, 0)]
        product = multiply("...OI,...RI->...OR", large, jnp.pad(x, filler))
        # Without a barrier XLA sees through the transposition, and turns the factors back.
        return jax.lax.optimization_barrier(product)[..., :rows].mT

    return jax.lax.platform_dependent(x, large, cpu=turned, default=plain)
