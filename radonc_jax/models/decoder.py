"""The decoder of LLaMA 2 and Mistral, and of their successors of the same shape, in Flax NNX.

Axes, used by every einsum and shape comment here:
  B batch, T query position, S key position, L layers, D hidden size, N query heads,
  K key/value heads, H head dim, F MLP size, V vocabulary, I / O input / output of a linear map.

Modules and parameters carry the names of the Hugging Face checkpoints and keep their orientation
(`kernel` is [out, in]), so a checkpoint goes in and out without a transposition. The layers'
parameters are stacked along a leading axis L and scanned. The same call trains (packed segments)
and decodes (cache in, cache out). The model knows nothing of adapters: `lora.inject` replaces
`Linear` modules from outside.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from radonc_jax import parallel
from radonc_jax.models.attention import CUDNN_BACKENDS, CUDNN_NAMES, AttentionConfig, attend, see
from radonc_jax.models.products import few_rows, matmul_precision, ordered_sum

# What the backward pass keeps per layer, by how much it may compute again. "nothing": no matrix
# product with the weights runs twice. "mlp": gate and up do, which are two thirds of what is kept.
# "layer": all but the last product of each layer do, from the layer's input alone. "direction" and
# "norm" are DoRA's, whose gradients ask for what every adapted weight gives: with "mlp" all of its
# products run twice.
SAVED_NAMES = {
    "nothing": (
        *("query", "key", "value", "attention", "residual", "gate", "up"),
        *("direction", "norm"),
    ),
    "mlp": ("query", "key", "value", "attention", "residual", "norm"),
    "layer": (),
}

# The linear maps of a layer, and the module that holds each.
PROJECTIONS = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}
# The names of what is made from their outputs without a further product with the weights.
OUTPUT_NAMES = {
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "residual",
    "gate_proj": "gate",
    "up_proj": "up",
}


@dataclass(frozen=True)
class Llama3RopeScaling:
    """Frequency scaling of Llama 3.1 and later (`rope_type: llama3` in `config.json`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    """What a checkpoint's `config.json` says of the architecture. No field has a default.

    `max_position_embeddings` is a limit, not part of the arithmetic: caches and examples longer
    than it are refused.
    """

    vocab_size: int
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Llama3RopeScaling | None
    sliding_window: int | None
    tie_word_embeddings: bool
    max_position_embeddings: int

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even for rotary embeddings")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window must be positive or null, not {self.sliding_window}")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values; slot s of a row holds position s, beyond what stands in a `Beginning`.

    Heads stand before slots, so that neither product of the attention has to transpose them.

    Attributes:
      key, value: of all layers, each [L, B, K, S, H]; or tuples of L arrays [B, K, S, H], which
        `Decoder.__call__` needs to run layers that are not stacked; within a layer one of these.
    """

    key: jax.Array | tuple[jax.Array, ...]
    value: jax.Array | tuple[jax.Array, ...]

    @property
    def length(self) -> int:
        return jax.tree.leaves(self.key)[0].shape[-2]

    def write(self, layer, places, key, value) -> "Cache":
        """Puts keys and values [B, T, K, H] into slots [B, T]; those beyond the end are dropped.

        `layer` is an index into stacked layers, None within one layer.
        """
        index = places[..., None]
        rows, slots = 0, 2
        if layer is not None:
            index = jnp.concatenate([jnp.full_like(index, layer), index], axis=-1)
            rows, slots = 1, 3
        indexed = (slots,) if layer is None else (0, slots)
        # Rows are a batch of the scatter and no index into it: rows that are spread over devices
        # are then written where they lie, and no device is sent another's.
        numbers = jax.lax.ScatterDimensionNumbers(
            update_window_dims=(2, 3),
            inserted_window_dims=indexed,
            scatter_dims_to_operand_dims=indexed,
            operand_batching_dims=(rows,),
            scatter_indices_batching_dims=(0,),
        )

        def put(array, new):
            new, mode = new.astype(array.dtype), jax.lax.GatherScatterMode.FILL_OR_DROP
            return jax.lax.scatter(array, index, new, numbers, mode=mode)

        return Cache(put(self.key, key), put(self.value, value))

    def read(self, layer, dtype) -> tuple[jax.Array, jax.Array]:
        """(keys, values) of a layer, each [B, S, K, H]."""
        pair = (self.key, self.value) if layer is None else (self.key[layer], self.value[layer])
        return tuple(x.transpose(0, 2, 1, 3).astype(dtype) for x in pair)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Beginning:
    """Keys and values of tokens with which many rows begin, held and read once for all of them
    (Juravsky et al. 2024, arXiv 2402.05099).

    Attributes:
      key, value: of all layers, each [L, K, P, H]; or tuples of L arrays [K, P, H], as of `Cache`.
      counts: int [B], how many of each row's tokens stand here, and not in its own cache: those at
        positions below it. 0 for a row that begins otherwise.
    """

    key: jax.Array | tuple[jax.Array, ...]
    value: jax.Array | tuple[jax.Array, ...]
    counts: jax.Array

    @property
    def length(self) -> int:
        return jax.tree.leaves(self.key)[0].shape[-2]

    def read(self, layer, dtype) -> tuple[jax.Array, jax.Array]:
        """(keys, values) of a layer, each [K, P, H]; `layer` may be a traced index."""
        return tuple(side[layer].astype(dtype) for side in (self.key, self.value))


@dataclass(frozen=True)
class Execution:
    """How the arithmetic of training is carried out; what comes out does not depend on it.

    Attributes:
      attention: of packed rows.
      recompute: what the backward pass computes again, to save memory; a key of `SAVED_NAMES`.
      unrolled: layers are compiled one by one and not as a loop, whose body must copy what is kept
        for the backward pass into stacks.
      implied: names that need not be kept beside "direction", from which they follow; set by
        `lora.inject`.
    """

    attention: AttentionConfig = AttentionConfig()
    recompute: str = "nothing"
    unrolled: bool = False
    implied: tuple[str, ...] = ()

    @property
    def saved_names(self) -> tuple[str, ...]:
        """What the backward pass is given of each layer, by checkpoint name."""
        names = SAVED_NAMES[self.recompute]
        if "direction" in names:
            names = tuple(name for name in names if name not in self.implied)
        return names


class Embedding(nnx.Module):
    def __init__(self, vocab_size: int, hidden_size: int, *, rngs: nnx.Rngs):
        self.embedding = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (vocab_size, hidden_size))
        )

    def __call__(self, tokens: jax.Array, dtype) -> jax.Array:
        return self.embedding[...].astype(dtype)[tokens]  # [B, T, D]


class Linear(nnx.Module):
    """x W^T without a bias: the only weight-bearing matrix product, and what adapters wrap."""

    def __init__(self, out_size: int, in_size: int, *, layers: int | None, rngs: nnx.Rngs):
        self.shape = (out_size, in_size) if layers is None else (layers, out_size, in_size)
        self.kernel = nnx.Param(0.02 * jax.random.normal(rngs.params(), self.shape))

    def weight(self, dtype) -> jax.Array:
        """The kernel [out, in] in a floating type; `models.quantize` keeps it in another form."""
        return self.kernel[...].astype(dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.weight(x.dtype)
        if x.ndim == 3 and x.shape[1] == 1:  # a decode step's
            return few_rows(x[:, 0], kernel)[:, None]
        return jnp.einsum("...I,OI->...O", x, kernel, precision=matmul_precision(x.dtype))


class RMSNorm(nnx.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019, arXiv 1910.07467), computed in float32."""

    def __init__(self, size: int, eps: float, *, layers: int | None):
        self.scale = nnx.Param(jnp.ones((size,) if layers is None else (layers, size)))
        self.eps = eps

    def __call__(self, x: jax.Array, *, ordered: bool = False) -> jax.Array:
        x32 = x.astype(jnp.float32)
        if ordered and x.dtype == jnp.float32:
            mean = ordered_sum(x32 * x32) / x.shape[-1]
        else:
            mean = jnp.mean(x32 * x32, axis=-1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(mean + self.eps)
        return self.scale[...].astype(x.dtype) * x32.astype(x.dtype)


def rope_frequencies(config: ModelConfig) -> jax.Array:
    """Rotary angular frequencies, float32 [H / 2] (Su et al. 2021, arXiv 2104.09864)."""
    exponent = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequency = 1.0 / (config.rope_theta**exponent)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    # Llama 3.1: long waves are stretched by `factor`, short ones kept, those between blended.
    wavelength = 2 * jnp.pi / frequency
    context = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = jnp.clip((context / wavelength - low) / (high - low), 0.0, 1.0)
    return (1 - blend) * frequency / scaling.factor + blend * frequency


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates pairs (i, i + H/2), as Hugging Face checkpoints store them.

    Args:
      x: [B, T, N or K, H].
      cos, sin: [B, T, 1, H / 2] in the dtype of x.
    """
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def pick(x: jax.Array, index: jax.Array) -> jax.Array:
    """x [B, T, ...] at positions index [B, M] of each row: [B, M, ...]."""
    index = index.reshape(*index.shape, *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1)


class Attention(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        c, layers = config, config.num_layers
        self.num_heads, self.num_kv_heads, self.head_dim = c.num_heads, c.num_kv_heads, c.head_dim
        query_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.q_proj = Linear(query_size, c.hidden_size, layers=layers, rngs=rngs)
        self.k_proj = Linear(kv_size, c.hidden_size, layers=layers, rngs=rngs)
        self.v_proj = Linear(kv_size, c.hidden_size, layers=layers, rngs=rngs)
        self.o_proj = Linear(c.hidden_size, query_size, layers=layers, rngs=rngs)

    def __call__(
        self, x, rope, places, visible, cache=None, layer=None, asking=None, beginning=None
    ):
        """x [B, T, D] -> ([B, T or M, D], cache).

        With a cache, keys are those of its slots, of which `places` [B, T] are written, and before
        them those of `beginning`, a pair [K, P, H]. With `asking` [B, M], the positions at which an
        output is wanted, only those ask; all T are still seen.
        """
        batch, length, _ = x.shape
        key = self.k_proj(x).reshape(batch, length, self.num_kv_heads, self.head_dim)
        value = self.v_proj(x).reshape(batch, length, self.num_kv_heads, self.head_dim)
        key = checkpoint_name(apply_rope(key, *rope), "key")
        if asking is not None:
            x, *rope = (pick(array, asking) for array in (x, *rope))
            visible, length = visible.at(asking), asking.shape[1]
        query = self.q_proj(x).reshape(batch, length, self.num_heads, self.head_dim)
        query = checkpoint_name(apply_rope(query, *rope), "query")
        value = checkpoint_name(value, "value")
        if cache is not None:
            cache = cache.write(layer, places, key, value)
            key, value = cache.read(layer, x.dtype)
        output = attend(query, key, value, visible, beginning=beginning, ordered=cache is not None)
        return self.o_proj(output.reshape(batch, length, self.num_heads * self.head_dim)), cache


class MLP(nnx.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        c, layers = config, config.num_layers
        self.gate_proj = Linear(c.intermediate_size, c.hidden_size, layers=layers, rngs=rngs)
        self.up_proj = Linear(c.intermediate_size, c.hidden_size, layers=layers, rngs=rngs)
        self.down_proj = Linear(c.hidden_size, c.intermediate_size, layers=layers, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate = checkpoint_name(self.gate_proj(x), "gate")
        up = checkpoint_name(self.up_proj(x), "up")
        return self.down_proj(jax.nn.silu(gate) * up)


class Block(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        c, layers = config, config.num_layers
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, layers=layers)
        self.self_attn = Attention(c, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, layers=layers)
        self.mlp = MLP(c, rngs=rngs)

    def __call__(
        self, x, rope, places, visible, cache=None, layer=None, asking=None, beginning=None
    ):
        ordered = cache is not None  # an answer must not depend on what else is decoded
        normed = self.input_layernorm(x, ordered=ordered)
        attended, cache = self.self_attn(
            normed, rope, places, visible, cache, layer, asking, beginning
        )
        x = x if asking is None else pick(x, asking)
        x = checkpoint_name(x + attended, "residual")
        x = x + self.mlp(self.post_attention_layernorm(x, ordered=ordered))
        return parallel.constrain(x, parallel.BATCH_AXES, None, None), cache


class Decoder(nnx.Module):
    """A decoder-only transformer.

    Args:
      config: the architecture.
      dtype: of activations and matrix products; parameters keep their own.
      execution: of training; None for the plain way.
      rngs: for random weights (normal, 0.02), the start of a model trained from nothing.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype=jnp.float32,
        execution: Execution | None = None,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.execution = execution or Execution()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, rngs=rngs)
        self.layers = Block(config, rngs=rngs)  # every parameter stacked [L, ...]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, layers=None)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.vocab_size, config.hidden_size, layers=None, rngs=rngs)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
        asking: jax.Array | None = None,
        blocks: Sequence[Block] | None = None,
        beginning: Beginning | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Runs the layers.

        Args:
          tokens: int [B, T].
          positions: int [B, T], restarting at 0 in each packed segment; with a cache, also the
            slots that are written, counted from the end of what `beginning` has of the row, and
            positions beyond the cache are dropped.
          segment_ids: int [B, T] for packed rows; None when a row is one segment.
          cache: from `init_cache` or an earlier call.
          asking: int [B, M], positions in the row at which the output is wanted; None for all.
            The last layer then computes its queries, output and MLP there only.
          blocks: the layers one by one, to be run instead of the stacked ones, in a plain loop and
            with a cache of tuples: nothing is then taken out of a stack.
          beginning: with a cache, what stands before it in rows that begin alike.

        Returns:
          hidden states [B, T or M, D] after the final norm, for `logits`; the new cache.
        """
        if cache is not None and segment_ids is not None:
            raise ValueError("packed segments cannot be decoded with a cache: pass one of the two")
        config = self.config
        x = parallel.constrain(
            self.embed_tokens(tokens, self.dtype), parallel.BATCH_AXES, None, None
        )
        angle = positions[..., None].astype(jnp.float32) * rope_frequencies(config)
        rope = tuple(f(angle)[:, :, None, :].astype(self.dtype) for f in (jnp.cos, jnp.sin))
        key_positions, places, shared = positions, positions, None
        if cache is not None:
            key_positions = jnp.broadcast_to(
                jnp.arange(cache.length), (tokens.shape[0], cache.length)
            )
        if beginning is not None:
            counts = beginning.counts[:, None]
            key_positions, places = key_positions + counts, positions - counts
            shared = beginning.counts, beginning.length
        packed = segment_ids is not None
        attention = self.execution.attention if packed else AttentionConfig()
        window = config.sliding_window
        visible = see(positions, key_positions, segment_ids, window, attention, shared)

        def first(layer):
            return None if beginning is None else beginning.read(layer, self.dtype)

        if blocks is not None:
            pairs = []
            for layer, (block, *pair) in enumerate(
                zip(blocks, cache.key, cache.value, strict=True)
            ):
                last = asking if block is blocks[-1] else None
                x, one = block(x, rope, places, visible, Cache(*pair), None, last, first(layer))
                pairs.append((one.key, one.value))
            return self.norm(x, ordered=True), Cache(
                *(tuple(side) for side in zip(*pairs, strict=True))
            )
        # Weights are picked by index, because slicing all layers but the last off the stack would
        # copy it; whatever else a layer holds (adapters) is small and sliced.
        graph, weights, rest = nnx.split(self.layers, nnx.Param, ...)

        def block(layer, rest) -> Block:
            def at_layer(stack):
                return jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)

            return nnx.merge(graph, jax.tree.map(at_layer, weights), rest)

        def run_layer(carry, rest):
            # The cache is carried, not scanned over, so that each layer updates it in place. So is
            # the layer's number: on GPUs a product reads its weights where they lie in the stack
            # if their place follows from the number of the loop's passes, and a copy otherwise.
            x, cache, layer = carry
            run = block(layer, rest)
            x, cache = run(x, rope, places, visible, cache, layer, None, first(layer))
            return (x, cache, layer + 1), None

        def run_last(carry, rest):
            x, cache = carry
            layer = jnp.int32(last)
            run = block(layer, rest)
            return run(x, rope, places, visible, cache, layer, asking, first(layer))

        if cache is None:
            names = self.execution.saved_names
            keep = jax.checkpoint_policies.save_only_these_names
            run_last = jax.checkpoint(run_last, policy=keep(*names))
            if names and attention.backend in CUDNN_BACKENDS:
                names = (*(name for name in names if name != "attention"), *CUDNN_NAMES)
            run_layer = jax.checkpoint(run_layer, policy=keep(*names), prevent_cse=False)
        last = config.num_layers - 1
        earlier = jax.tree.map(lambda stack: stack[:last], rest)
        unroll = cache is None and self.execution.unrolled
        start = (x, cache, jnp.int32(0))
        (x, cache, _), _ = jax.lax.scan(run_layer, start, earlier, length=last, unroll=unroll)
        x, cache = run_last((x, cache), jax.tree.map(lambda stack: stack[last], rest))
        return self.norm(x, ordered=cache is not None), cache

    def logits(self, hidden: jax.Array, *, exact: bool = False) -> jax.Array:
        """Hidden states [..., D] -> float32 logits [..., V].

        In bfloat16 they are rounded to it, as those of the checkpoint's own library are, so that
        the best two are often equal; `exact` leaves the sums in float32, for choosing tokens.
        """
        if self.config.tie_word_embeddings:
            kernel = self.embed_tokens.embedding[...].astype(hidden.dtype)
        else:
            kernel = self.lm_head.weight(hidden.dtype)
        wanted = jnp.float32 if exact else None
        if hidden.ndim == 3 and hidden.shape[1] == 1:  # a decode step's
            return few_rows(hidden[:, 0], kernel, wanted)[:, None].astype(jnp.float32)
        logits = jnp.einsum(
            "...D,VD->...V",
            hidden,
            kernel,
            precision=matmul_precision(hidden.dtype),
            preferred_element_type=wanted,
        )
        return logits.astype(jnp.float32)

    def init_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for `length` positions; ValueError if the model has fewer."""
        c = self.config
        if length > c.max_position_embeddings:
            raise ValueError(
                f"a cache of {length} positions was asked for, but the model's context "
                f"(max_position_embeddings) ends at {c.max_position_embeddings}"
            )
        shape = (c.num_layers, batch, c.num_kv_heads, length, c.head_dim)
        return Cache(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype))
