"""Attention behind one function: causal, inside one segment, within a window.

Axes: B batch, T query, S key, N query heads, K key/value heads, G = N / K, H head dim.
"""

import jax
import jax.numpy as jnp


def attention_mask(
    query_positions: jax.Array,
    key_positions: jax.Array,
    query_segments: jax.Array | None,
    key_segments: jax.Array | None,
    window: int | None,
) -> jax.Array:
    """Which key each query may see; the one place where causality, packing and the window meet.

    Args:
      query_positions: int [B, T], counted from 0 within each segment.
      key_positions: int [B, S].
      query_segments: int [B, T] or None; tokens of different segments never see each other.
      key_segments: int [B, S] or None.
      window: a query sees itself and the `window - 1` keys before it (Mistral's sliding window,
        Jiang et al. 2023, arXiv 2310.06825); None for no limit.

    Returns:
      bool [B, T, S].
    """
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    mask = distance >= 0
    if window is not None:
        mask &= distance < window
    if query_segments is not None:
        mask &= query_segments[:, :, None] == key_segments[:, None, :]
    return mask


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, *, ordered: bool = False
) -> jax.Array:
    """Scaled dot-product attention with grouped queries (Ainslie et al. 2023, arXiv 2305.13245).

    Scores and softmax are float32 whatever the input is.

    Args:
      query: [B, T, N, H].
      key, value: [B, S, K, H] with N a multiple of K.
      mask: bool [B, T, S]; a query that may see nothing gets a meaningless but finite output.
      ordered: sums over keys are those of `ordered_sum`.

    Returns:
      [B, T, N, H] in the dtype of `query`.
    """
    batch, length, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[2]
    groups = num_heads // num_kv_heads
    precision = matmul_precision(query.dtype)
    # Heads first and the group's queries in one axis: plain batched matrix products, which on a
    # CPU run at two to three times the speed of the same contraction over five axes.
    query = query.reshape(batch, length, num_kv_heads, groups, head_dim).transpose(0, 2, 3, 1, 4)
    query = query.reshape(batch, num_kv_heads, groups * length, head_dim)
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    scores = jnp.einsum(
        "BKTH,BKSH->BKTS", query, key, precision=precision, preferred_element_type=jnp.float32
    )
    scores = scores.reshape(batch, num_kv_heads, groups, length, -1) * head_dim**-0.5
    scores = jnp.where(mask[:, None, None, :, :], scores, jnp.finfo(jnp.float32).min)
    if ordered:
        weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
        weights = (weights / ordered_sum(weights)).astype(value.dtype)
    else:
        weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    weights = weights.reshape(batch, num_kv_heads, groups * length, -1)
    output = jnp.einsum("BKTS,BKSH->BKTH", weights, value, precision=precision)
    output = output.reshape(batch, num_kv_heads, groups, length, head_dim)
    return output.transpose(0, 3, 1, 2, 4).reshape(batch, length, num_heads, head_dim)


def ordered_sum(x: jax.Array) -> jax.Array:
    """Sum over the last axis, which stays with size one; zeros at its end do not change a bit.

    As a matrix product, because XLA's CPU reductions add in an order that depends on how many rows
    there are, and its products do not: in float32 a row's sum is the same beside any others.
    """
    if x.dtype != jnp.float32:
        return jnp.sum(x, axis=-1, keepdims=True)
    ones = jnp.ones((x.shape[-1], 8), x.dtype)  # one column would be a product of another kind
    sums = jnp.einsum("...S,SO->...O", x, ones, precision=jax.lax.Precision.HIGHEST)
    return sums[..., :1]


def matmul_precision(dtype) -> jax.lax.Precision | None:
    """float32 means float32: without this, GPUs and TPUs multiply float32 in fewer bits."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
