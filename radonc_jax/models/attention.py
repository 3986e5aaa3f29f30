"""Attention behind one function: causal, inside one segment, within a window.

Four backends give the same outputs: "xla" everywhere; "cudnn_packed" on NVIDIA GPUs, and "cudnn"
where that does not run, for which packed rows are laid out as padded segments; "splash" on TPUs.
Each must pass `self_test` on the device at hand before it is used (`choose_backend`).

Axes: B batch, T query, S key, N query heads, K key/value heads, G = N / K, H head dim,
E segments of a row, P tokens of the longest segment.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from radonc_jax import compiler, parallel
from radonc_jax.models.products import few_rows, matmul_precision, ordered_sum

BACKENDS = ("xla", "cudnn_packed", "cudnn", "splash")
CUDNN_BACKENDS = ("cudnn_packed", "cudnn")
FAST = {"gpu": CUDNN_BACKENDS, "tpu": ("splash",)}  # by platform, best first
QUERY_BLOCK = 128  # queries of a packed row that "xla" takes at a time,
MOST_BLOCKS = 8  # unless the row would have more blocks than that
LONGEST_TEST = 4096  # tokens of a row of `self_test`, whose memory grows with their square
SPREAD = 4  # what a third run may differ, over what two runs of the same input did
# The first JAX whose cuDNN attention, of which private parts are used, is not known here.
UNKNOWN_JAX = (0, 13)
# What cuDNN leaves for its backward pass besides query, key and value, by checkpoint name. The
# name "attention" is then a copy of the first, and need not be kept.
CUDNN_NAMES = ("cudnn_output", "cudnn_log_sum_exp")


@dataclass(frozen=True)
class AttentionConfig:
    """How packed rows attend; what comes out does not depend on it.

    Attributes:
      backend: one of BACKENDS; it is used where packed rows train, "xla" everywhere else.
      segments: the most segments of a row, which cuDNN wants to know, and
      segment_length: tokens of the longest; "cudnn" alone reads it.
      interpret: run the "splash" kernel without a TPU, slowly, for tests.
    """

    backend: str = "xla"
    segments: int = 0
    segment_length: int = 0
    interpret: bool = False


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Visible:
    """What each query may see, made once for all layers; `see` makes it.

    Attributes:
      positions: int [B, T], counted from 0 within each segment; `key_positions` [B, S] likewise.
      segments: int [B, T] or None; tokens of different segments never see each other, and each
        segment lies in the row in one piece and in order.
      window: a query sees itself and the `window - 1` keys before it (Mistral's sliding window,
        Jiang et al. 2023, arXiv 2310.06825); None for no limit.
      mask: bool [B, T, S], for "xla";
      beginning: bool [B, T, P], the same of keys that all rows share, see `decoder.Beginning`.
      padded: int [B, E, P], the place in the row of each token of each segment, for "cudnn";
      place: int [B, T], where each token lies among those E * P;
      starts: int [B, E + 1], where each segment begins in the row, for "cudnn_packed";
      lengths: int [B, E], tokens of each segment; where there is none -1, for "cudnn" 1.
    """

    positions: jax.Array
    key_positions: jax.Array
    segments: jax.Array | None
    mask: jax.Array | None = None
    beginning: jax.Array | None = None
    padded: jax.Array | None = None
    place: jax.Array | None = None
    starts: jax.Array | None = None
    lengths: jax.Array | None = None
    window: int | None = field(default=None, metadata={"static": True})
    config: AttentionConfig = field(default=AttentionConfig(), metadata={"static": True})

    def at(self, asking: jax.Array) -> "Visible":
        """The same for the queries at positions `asking` [B, M] of each row alone, by "xla"."""

        def picked(array):
            return None if array is None else jnp.take_along_axis(array, asking, axis=1)

        mask, beginning = (
            None if mask is None else jnp.take_along_axis(mask, asking[:, :, None], axis=1)
            for mask in (self.mask, self.beginning)
        )
        if mask is None:
            positions, segments = picked(self.positions), picked(self.segments)
            mask = attention_mask(
                positions, self.key_positions, segments, self.segments, self.window
            )
        return Visible(
            picked(self.positions),
            self.key_positions,
            None,
            mask=mask,
            beginning=beginning,
            window=self.window,
        )


def see(
    positions: jax.Array,
    key_positions: jax.Array,
    segments: jax.Array | None,
    window: int | None,
    config: AttentionConfig,
    beginning: tuple[jax.Array, int] | None = None,
) -> Visible:
    """What each query may see, in the form that the backend wants; see `Visible`.

    `beginning`: int [B], how many of P shared keys begin each row, and P; None without any.
    """
    if config.backend == "xla":
        mask, first = attention_mask(positions, key_positions, segments, segments, window), None
        if beginning is not None:
            counts, size = beginning
            places = jnp.broadcast_to(jnp.arange(size), (len(counts), size))
            first = attention_mask(positions, places, None, None, window)
            first &= (places < counts[:, None])[:, None]
        return Visible(
            positions, key_positions, segments, mask=mask, beginning=first, window=window
        )
    if config.backend == "splash":
        return Visible(positions, key_positions, segments, window=window, config=config)
    # Segments are numbered from 1 and lie one after the other; 0 is padding.
    most = config.segments
    if config.backend == "cudnn_packed":
        most = max(most, 2)  # with one it would be told nothing of where that lies
    inside = segments[:, None, :] == jnp.arange(1, most + 1)[:, None]  # [B, E, T]
    first = jnp.argmax(inside, axis=-1).astype(jnp.int32)
    lengths = jnp.sum(inside, axis=-1, dtype=jnp.int32)
    if config.backend == "cudnn_packed":
        # No kernel is asked about nothing: in an empty row the first token, which nobody reads, is
        # a segment.
        empty = (lengths[:, 0] == 0)[:, None] & (jnp.arange(most) == 0)
        lengths = jnp.where(empty, 1, lengths)
        starts = jnp.pad(jnp.where(lengths > 0, first, -1), [(0, 0), (0, 1)], constant_values=-1)
        return Visible(
            positions,
            key_positions,
            segments,
            starts=starts,
            lengths=jnp.where(lengths > 0, lengths, -1),
            window=window,
            config=config,
        )
    offsets = jnp.arange(config.segment_length)
    padded = jnp.minimum(first[..., None] + offsets, segments.shape[1] - 1)
    place = jnp.maximum(segments - 1, 0) * config.segment_length + positions
    return Visible(
        positions,
        key_positions,
        segments,
        padded=padded,
        place=place,
        lengths=jnp.maximum(lengths, 1),  # nor is one asked about nothing here
        window=window,
        config=config,
    )


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
      window: as of `Visible`.

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
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visible: Visible,
    *,
    beginning: tuple[jax.Array, jax.Array] | None = None,
    ordered: bool = False,
) -> jax.Array:
    """Scaled dot-product attention with grouped queries (Ainslie et al. 2023, arXiv 2305.13245).

    Args:
      query: [B, T, N, H].
      key, value: [B, S, K, H] with N a multiple of K.
      visible: from `see`; a query that may see nothing gets a meaningless but finite output.
      beginning: keys and values [K, P, H] that rows share, with "xla" and unpacked rows alone;
        `visible.beginning` says which of them a query sees beside its own row's.
      ordered: with "xla", sums over keys are those of `ordered_sum`.

    Returns:
      [B, T, N, H] in the dtype of `query`, under the checkpoint name "attention".
    """
    if visible.config.backend == "splash":
        return _splash(query, key, value, visible)
    if visible.config.backend in CUDNN_BACKENDS:
        output = _cudnn(query, key, value, visible)
    else:
        output = _xla(query, key, value, visible, beginning, ordered)
    return checkpoint_name(output, "attention")


def _xla(query, key, value, visible: Visible, beginning=None, ordered: bool = False) -> jax.Array:
    """Packed rows in blocks of queries, each with the keys up to its end: what comes later in the
    row is never seen, so nearly half of the scores need not be computed."""
    length = query.shape[1]
    if visible.segments is None:
        if beginning is not None:
            beginning = (*beginning, visible.beginning)
        return _xla_block(query, key, value, visible.mask, ordered, beginning)
    block = max(QUERY_BLOCK, -(-length // MOST_BLOCKS))
    outputs = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        mask = visible.mask[:, start:stop, :stop]
        outputs.append(
            _xla_block(query[:, start:stop], key[:, :stop], value[:, :stop], mask, ordered)
        )
    return jnp.concatenate(outputs, axis=1)


def _xla_block(query, key, value, mask, ordered: bool, beginning=None) -> jax.Array:
    """Scores and softmax are float32 whatever the input is."""
    batch, length, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[2]
    groups = num_heads // num_kv_heads
    einsum = functools.partial(jnp.einsum, precision=matmul_precision(query.dtype))

    def scores_of(query, key, mask, *shape):
        if length == 1:
            scores = few_rows(query, key, preferred_element_type=jnp.float32)
        else:
            scores = einsum("...TH,...SH->...TS", query, key, preferred_element_type=jnp.float32)
        scores = scores.reshape(*shape, groups, length, -1) * head_dim**-0.5
        return jnp.where(mask, scores, jnp.finfo(jnp.float32).min)

    # Heads first and the group's queries in one axis: plain batched matrix products, which on a
    # CPU run at two to three times the speed of the same contraction over five axes.
    query = query.reshape(batch, length, num_kv_heads, groups, head_dim).transpose(0, 2, 3, 1, 4)
    query = query.reshape(batch, num_kv_heads, groups * length, head_dim)
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    scores = scores_of(query, key, mask[:, None, None], batch, num_kv_heads)
    if beginning is None:
        weights = _softmax(scores)[0] if ordered else jax.nn.softmax(scores, axis=-1)
    else:
        # The queries of all rows at once: what rows share is read once, and not once a row.
        first_key, first_value, first_mask = beginning
        together = query.swapaxes(0, 1).reshape(num_kv_heads, -1, head_dim)
        first = scores_of(together, first_key, first_mask[:, None], num_kv_heads, batch)
        weights, first = _softmax(scores, first)
    weights = weights.astype(value.dtype).reshape(batch, num_kv_heads, groups * length, -1)
    output = einsum("BKTS,BKSH->BKTH", weights, value)
    if beginning is not None:
        first = first.astype(value.dtype).reshape(num_kv_heads, batch * groups * length, -1)
        first = einsum("KRP,KPH->KRH", first, first_value)
        output += first.reshape(num_kv_heads, batch, -1, head_dim).swapaxes(0, 1)
    output = output.reshape(batch, num_kv_heads, groups, length, head_dim)
    return output.transpose(0, 3, 1, 2, 4).reshape(batch, length, num_heads, head_dim)


def _softmax(scores, first=None) -> tuple[jax.Array, jax.Array | None]:
    """Over the last axes of `scores` [B, K, G, T, S] and of `first` [K, B, G, T, P] together; sums
    are those of `ordered_sum`."""
    top = jnp.max(scores, axis=-1, keepdims=True)
    if first is None:
        weights = jnp.exp(scores - top)
        return weights / ordered_sum(weights), None
    top = jnp.maximum(top, jnp.max(first, axis=-1, keepdims=True).swapaxes(0, 1))
    weights, first = jnp.exp(scores - top), jnp.exp(first - top.swapaxes(0, 1))
    total = ordered_sum(weights) + ordered_sum(first).swapaxes(0, 1)
    return weights / total, first / total.swapaxes(0, 1)


class Kernels(NamedTuple):
    """A kernel for segments, each of which is causal and apart.

    They lie in rows [R, P]: each row is one that begins at its first token, `lengths` is [R] and
    `starts` None; or each row has up to E of them at `starts` [R, E + 1], `lengths` is [R, E], and
    both have -1 where there is none.

    Attributes:
      forward: (query [R, P, N, H], key and value [R, P, K, H], lengths, starts, window) ->
        (output [R, P, N, H], log-sum-exp of the scores, float32 [R, N, P], or of each segment by
        itself [R * E, N, P], those of all rows numbered without a gap).
      backward: (query, key, value, lengths, starts, window, output, log-sum-exp, gradient of the
        output) -> gradients of query, key and value.

    What they are given and give beyond the length of a segment is never looked at.
    """

    forward: Callable
    backward: Callable


def _cudnn_forward(query, key, value, lengths, starts, window):
    """What JAX's public function runs, which would round the log-sum-exp to 16 bits, and which
    takes no `starts`."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    return cudnn.dot_product_attention(
        query,
        key,
        value,
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=starts,
        kv_offsets=starts,
        scale=query.shape[-1] ** -0.5,
        mask_type=cudnn.MaskType.PADDING_CAUSAL,
        sliding_window_length=window,
        return_residual=True,
    )


def _cudnn_backward(query, key, value, lengths, starts, window, output, log_sum_exp, gradient):
    """JAX's own pullback, with what was kept in the place of what its forward pass would leave.

    Nothing uses that forward pass then, so it is not run.
    """
    made, pullback = jax.vjp(
        lambda *arrays: _cudnn_forward(*arrays, lengths, starts, window), query, key, value
    )
    kept = {id(new): old for new, old in zip(made, (output, log_sum_exp), strict=True)}
    pullback = jax.tree.map(lambda leaf: kept.get(id(leaf), leaf), pullback)
    return pullback((gradient, jnp.zeros_like(log_sum_exp)))


CUDNN = Kernels(_cudnn_forward, _cudnn_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cudnn(query, key, value, visible: Visible, kernels: Kernels = CUDNN) -> jax.Array:
    """Segments where they lie, or as padded rows of their own for this product alone.

    Rows stay packed for all other products, which is where the work is, and in what is kept for the
    backward pass: padded, a layer's output alone would be several times as large.
    """
    return _segments_forward(query, key, value, visible, kernels)[0]


def _segments_forward(query, key, value, visible: Visible, kernels: Kernels):
    layout_of = _layout(visible)

    def on_device(arrays, rows):
        layout = layout_of(visible.window, *rows)
        output, log_sum_exp = kernels.forward(
            *(layout.unpack(x) for x in arrays), layout.lengths, layout.starts, layout.window
        )
        return layout.pack(output), layout.pack_statistic(log_sum_exp)

    output, log_sum_exp = _on_each_device(on_device, (query, key, value), layout_of.rows(visible))
    output = checkpoint_name(output, CUDNN_NAMES[0])
    log_sum_exp = checkpoint_name(log_sum_exp, CUDNN_NAMES[1])
    return output, (query, key, value, visible, output, log_sum_exp)


def _segments_backward(kernels: Kernels, saved, gradient):
    *arrays, visible, output, log_sum_exp = saved
    layout_of = _layout(visible)

    def on_device(arrays, rows):
        layout = layout_of(visible.window, *rows)
        *arrays, log_sum_exp, gradient = arrays
        *inputs, output = (layout.unpack(x) for x in arrays)
        # Queries beyond the end have no gradient, however a kernel goes about it.
        gradient = jnp.where(layout.inside, layout.unpack(gradient), 0)
        gradients = kernels.backward(
            *inputs,
            layout.lengths,
            layout.starts,
            layout.window,
            output,
            layout.unpack_statistic(log_sum_exp),
            gradient,
        )
        return tuple(layout.pack(x) for x in gradients)

    arrays = (*arrays, output, log_sum_exp, gradient)
    return *_on_each_device(on_device, arrays, layout_of.rows(visible)), None


_cudnn.defvjp(_segments_forward, _segments_backward)


def _layout(visible: Visible) -> type:
    return _InPlace if visible.config.backend == "cudnn_packed" else _Padded


class _InPlace:
    """Segments that a kernel finds in their rows [B, T, ...]."""

    @staticmethod
    def rows(visible: Visible) -> tuple[jax.Array, ...]:
        """Of `visible`, what a device needs of its own rows."""
        return visible.starts, visible.lengths, visible.segments, visible.positions

    def __init__(self, window: int | None, starts, lengths, segments, positions):
        length = segments.shape[1]
        self.starts, self.lengths = starts, lengths
        self.window = window if window is not None and window < length else None
        self.inside = (segments > 0)[..., None, None]
        counts = jnp.sum(lengths > 0, axis=1)
        number = (jnp.cumsum(counts) - counts)[:, None] + segments - 1
        self._statistics = lengths.size, length
        self._place = jnp.where(segments > 0, number * length + positions, lengths.size * length)

    def unpack(self, x):
        return x

    def pack(self, x):
        return jnp.where(self.inside, x, 0)

    def pack_statistic(self, x):
        """[B * E, N, T], each segment from its own beginning, to [B, T, N, 1]."""
        x = x.transpose(0, 2, 1).reshape(-1, x.shape[1])
        return self.pack(jnp.take(x, self._place, axis=0, mode="clip")[..., None])

    def unpack_statistic(self, x):
        heads = x.shape[2]
        flat = jnp.zeros((np.prod(self._statistics), heads), x.dtype)
        flat = flat.at[self._place].set(x[..., 0], mode="drop")
        return flat.reshape(*self._statistics, heads).transpose(0, 2, 1)


class _Padded:
    """The way from packed rows [B, T, ...] to padded segments [B * E, P, ...] and back."""

    @staticmethod
    def rows(visible: Visible) -> tuple[jax.Array, ...]:
        """Of `visible`, what a device needs of its own rows."""
        return visible.padded, visible.place, visible.lengths, visible.segments

    def __init__(self, window: int | None, padded, place, lengths, segments):
        batch, parts, longest = padded.shape
        self._shape = batch * parts, longest
        self._padded = padded.reshape(batch, parts * longest)
        self._place, self._segments = place, segments
        self.lengths, self.starts = lengths.reshape(-1), None
        self.window = window if window is not None and window < longest else None
        # A segment's own tokens are those that come back to where they were taken from.
        back = jnp.take_along_axis(place, self._padded, axis=1)
        own = back == jnp.arange(parts * longest)
        own &= jnp.take_along_axis(segments, self._padded, axis=1) > 0
        self.inside = own.reshape(*self._shape, 1, 1)

    def unpack(self, x):
        x = jnp.take_along_axis(x, self._padded[..., None, None], axis=1)
        return x.reshape(*self._shape, *x.shape[2:])

    def pack(self, x):
        x = x.reshape(*self._padded.shape, *x.shape[2:])
        x = jnp.take_along_axis(x, self._place[..., None, None], axis=1)
        return jnp.where(self._segments[..., None, None] > 0, x, 0)

    def pack_statistic(self, x):
        """[B * E, N, P] to [B, T, N, 1]."""
        return self.pack(x.transpose(0, 2, 1)[..., None])

    def unpack_statistic(self, x):
        # Queries beyond the end have no weights either.
        return jnp.where(self.inside, self.unpack(x), 1e30)[..., 0].transpose(0, 2, 1)


def _on_each_device(kernel, arrays: tuple[jax.Array, ...], rows: tuple[jax.Array, ...]):
    """Runs a kernel on each device's own rows and heads; the compiler could not cut it up itself.

    Args:
      kernel: of (arrays, rows); gives arrays like `arrays`.
      arrays: each [B, T, heads, ...].
      rows: arrays whose leading axis is that of the batch.
    """
    if not jax.sharding.get_abstract_mesh().empty:
        heads = PartitionSpec(parallel.BATCH_AXES, None, "tensor", None)
        specs = tuple(PartitionSpec(parallel.BATCH_AXES, *(None,) * (x.ndim - 1)) for x in rows)
        kernel = jax.shard_map(
            kernel,
            in_specs=((heads,) * len(arrays), specs),
            out_specs=heads,
            check_vma=False,
        )
    return kernel(arrays, rows)


def _splash(query, key, value, visible: Visible) -> jax.Array:
    """The TPU's block-sparse kernel; each device runs it on its rows and heads."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, head_dim = query.shape[1], query.shape[3]
    block = next((size for size in (512, 256, 128) if length % size == 0), None)
    if block is None:
        raise ValueError(f"rows of {length} tokens: splash attention wants a multiple of 128")
    # Segments keep packed tokens apart, so causality and the window may count along the row.
    mask = splash.CausalMask((length, length))
    if visible.window is not None and visible.window < length:
        mask = splash.LocalMask((length, length), (visible.window - 1, 0), 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes = splash.BlockSizes(**{f"block_{name}": block for name in names})

    def on_device(arrays, rows):
        (query, key, value), (segments,) = arrays, rows
        kernel = splash.make_splash_mha(
            splash.MultiHeadMask([mask] * query.shape[2]),
            head_shards=1,
            q_seq_shards=1,
            block_sizes=sizes,
            residual_checkpoint_name="attention",
            interpret=visible.config.interpret,
        )

        def row(query, key, value, segments):
            return kernel(query, key, value, segment_ids=splash.SegmentIds(segments, segments))

        heads_first = (x.transpose(0, 2, 1, 3) for x in (query, key, value))
        return jax.vmap(row)(*heads_first, segments).transpose(0, 2, 1, 3)

    query = query * jnp.asarray(head_dim**-0.5, query.dtype)
    return _on_each_device(on_device, (query, key, value), (visible.segments,))


def choose_backend(
    wanted: str,
    *,
    platform: str,
    dtype,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    row_lengths: Sequence[int] = (256,),
    proven: bool = True,
) -> tuple[str, str]:
    """The backend to train with, proven on the device at hand, and a line on why.

    Args:
      wanted: one of BACKENDS, or "auto": the platform's fast one if it passes, else "xla" if that
        does.
      platform: "gpu", "tpu" or "cpu".
      dtype: of activations.
      num_heads, num_kv_heads, head_dim: of the model.
      row_lengths: tokens of the rows that it will see.
      proven: run the self-test; without, for a device that is only compiled for.

    Raises:
      ValueError: the wanted backend is not of this platform, or it, or "xla", fails its self-test.
    """
    fast = FAST.get(platform, ())
    if wanted not in ("auto", *BACKENDS):
        raise ValueError(f"train.attention must be one of {('auto', *BACKENDS)}, not {wanted!r}")
    if wanted not in ("auto", "xla", *fast):
        raise ValueError(f'train.attention="{wanted}" does not run on {platform}: use "auto"')
    longest = min(-(-max(256, *row_lengths) // 128) * 128, LONGEST_TEST)

    def attempt(backend: str) -> tuple[str | None, str]:
        """(what is wrong with it or None, else why it is used)."""
        unfit = unfit_for(backend, dtype, head_dim, row_lengths)
        if unfit is not None:
            return unfit, ""
        if not proven:
            return None, "not tested: it is not run here"
        test, length = self_test, longest
        if backend == "xla":
            # Longer rows have no more blocks; on a CPU two of them do, and are compiled sooner.
            most = (2 if platform == "cpu" else MOST_BLOCKS) * QUERY_BLOCK
            test, length = _tested_once, min(longest, most)
        try:
            unsteady = test(backend, dtype, num_heads, num_kv_heads, head_dim, length)
        except Exception as error:  # whatever a kernel dies of, it is not used
            told = " ".join(str(error).split())
            return f"{backend} attention failed its self-test here: {told}", ""
        why = "passed its self-test"
        if unsteady:
            why += (
                f"; its {', '.join(unsteady)} differ in the last bits from run to run, unless "
                "XLA_FLAGS=--xla_gpu_deterministic_ops=true"
            )
        return None, why

    reasons = []
    for backend in (*fast, "xla") if wanted == "auto" else (wanted,):
        unfit, why = attempt(backend)
        if unfit is None:
            return backend, "; ".join(dict.fromkeys([why, *reasons]))
        reasons.append(unfit)
    if wanted in fast:
        raise ValueError(f'{reasons[0]}. Set train.attention="auto", or "xla"')
    # There is nothing below it: a device whose plainest attention is wrong must not train.
    raise ValueError(f"{'; '.join(reasons)}. Do not train on this device")


def unfit_for(backend: str, dtype, head_dim: int, row_lengths: Sequence[int]) -> str | None:
    """What a backend cannot compute of this, by its own limits; None if it can."""
    if backend in CUDNN_BACKENDS and jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN attention computes in 16 bits, not {jnp.dtype(dtype).name}"
    if backend in CUDNN_BACKENDS and jax.__version_info__ >= UNKNOWN_JAX:
        known = ".".join(map(str, UNKNOWN_JAX))
        return f"cuDNN attention is called as JAX has it before {known}; this is {jax.__version__}"
    if backend == "cudnn_packed" and jax.__version_info__ < (0, 11, 1):
        # https://github.com/jax-ml/jax/pull/39521
        return f"JAX {jax.__version__} finds packed segments of grouped queries in the wrong places"
    if backend == "splash" and head_dim % 128:
        return f"splash attention wants heads of a multiple of 128, not {head_dim}"
    if backend == "splash" and any(length % 128 for length in row_lengths):
        return (
            f"splash attention wants rows of a multiple of 128, not of {sorted(set(row_lengths))} "
            "tokens: choose such a batch.sequence_length"
        )
    return None


def self_test(
    backend: str,
    dtype,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    length: int = 256,
    interpret: bool = False,
) -> list[str]:
    """Proves a backend on packed rows, on the device at hand.

    For the model's grouped queries and for plain ones, without a window and with one shorter than
    a segment: outputs and gradients are those of `jax.nn.dot_product_attention` with the whole mask
    up to the rounding of `dtype`, and when one segment changes, those of the others stay the same
    bit for bit. Rows have `length` tokens, as many as in training up to LONGEST_TEST, so that
    segments and the window cross the blocks of a kernel.

    A kernel may sum in an order that changes from run to run (cuDNN's gradients, unless XLA is told
    otherwise), by one rounding of the largest at most. What differs between runs of the same input
    may differ as much, and no more than SPREAD times that, when another segment changes.

    Returns:
      which of outputs and gradients are not the same bits from run to run; none as a rule.

    Raises:
      ValueError: which of these does not hold.
    """
    # Some padding is left at the end of each row.
    sizes = (length // 4 - 3, 1, 2 * length // 5, length // 4 + 6)
    # Rows of more and of fewer segments, none of as many as there could be, and an empty one.
    segments = np.zeros((3, length), np.int32)
    positions = np.zeros((3, length), np.int32)
    for row, order in enumerate((sizes[::-1][:3], sizes)):
        start = 0
        for number, size in enumerate(order, start=1):
            segments[row, start : start + size] = number
            positions[row, start : start + size] = np.arange(size)
            start += size
    changed = segments == 3
    others = (segments > 0) & ~changed
    tolerance = max(4 * float(jnp.finfo(dtype).eps), 1e-5)

    # Few heads are as telling as many, and the group's size is kept.
    groups, kv = num_heads // num_kv_heads, min(num_kv_heads, 2)
    grouped, windows = sorted({groups, 1}), (None, max(17, length // 7))
    config = AttentionConfig(backend, len(sizes) + 1, -(-max(sizes) // 64) * 64, interpret)
    rng = np.random.default_rng(0)
    given, weights = [], []
    for group in grouped:
        shapes = [(3, length, n, head_dim) for n in (group * kv, kv, kv, group * kv)]
        *arrays, weight = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
        given.append(arrays)
        weights.append(weight.astype(np.float32) * (segments > 0)[:, :, None, None])
    other = [
        [np.where(changed[:, :, None, None], -2 * x + 1, x).astype(dtype) for x in arrays]
        for arrays in given
    ]

    def ours(query, key, value, window):
        visible = see(positions, positions, jnp.asarray(segments), window, config)
        return attend(query, key, value, visible)

    def reference(query, key, value, window):
        mask = attention_mask(positions, positions, segments, segments, window)

        @jax.checkpoint  # a row at a time in both passes: the scores of all of them are large
        def row(arrays):
            *arrays, mask = (x[None] for x in arrays)
            with jax.default_matmul_precision("highest"):
                output = jax.nn.dot_product_attention(
                    *arrays, mask=mask[:, None], implementation="xla"
                )
            return output[0]

        return jax.lax.map(row, (query, key, value, jnp.asarray(mask)))

    # All in one program, which is compiled sooner than one for each. In a mesh, a test of one
    # device's kernel would be cut up: it runs outside of it.
    @functools.partial(
        jax.jit,
        static_argnums=0,
        compiler_options=compiler.options(jax.local_devices()[0], "training"),
    )
    def run(attention, given):
        results = []
        for arrays, weight in zip(given, weights, strict=True):
            for window in windows:

                def loss(*arrays, weight=weight, window=window):
                    output = attention(*arrays, window)
                    return jnp.sum(output.astype(jnp.float32) * weight), output

                gradients, output = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*arrays)
                results.append((output, *gradients))
        return results

    names = ("outputs", "query gradients", "key gradients", "value gradients")
    kinds = [
        f"{group} queries a key head, window {window}" for group in grouped for window in windows
    ]
    unsteady = set()
    expected, first, second, after = (
        jax.device_get(run(*arguments))
        for arguments in ((reference, given), (ours, given), (ours, given), (ours, other))
    )
    for what, *results in zip(kinds, expected, first, second, after, strict=True):
        for name, *found in zip(names, *results, strict=True):
            right, got, same, again = (np.asarray(x, np.float32) for x in found)
            real = segments > 0
            error = np.abs(got - right)[real].max() / np.abs(right[real]).max()
            if not error < tolerance:
                raise ValueError(f"{what}: {name} are off by {error:.2g} of the largest")
            spread = np.abs(got - same)[others].max()
            if not spread <= float(jnp.finfo(dtype).eps) * np.abs(got[others]).max():
                raise ValueError(f"{what}: {name} differ from run to run by {spread:.2g}")
            if spread > 0:
                unsteady.add(name)
            if not np.abs(got - again)[others].max() <= SPREAD * spread:
                raise ValueError(f"{what}: segments of a packed row see each other ({name})")
    return [name for name in names if name in unsteady]


# A process that trains one run after another need not prove anew what none of them changes.
_tested_once = functools.cache(self_test)
