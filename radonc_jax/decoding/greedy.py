"""Greedy decoding on the device: slots of a cache, filled by prefills and emptied as rows finish.

Everything here is pure and runs inside `jax.jit`; which prompt gets which slot, and when, is the
business of `scheduler`. Axes: B slots, R rows of one prefill, T tokens of a prefill, S positions of
the cache, M new tokens, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from radonc_jax import parallel
from radonc_jax.decoding.constrain import Trie, log_total
from radonc_jax.models.decoder import Beginning, Cache, Decoder, ModelConfig

# Of a cache of stacked layers [L, B, K, S, H]; one layer's is without the first.
CACHE_AXES = (None, parallel.BATCH_AXES, "tensor", None, None)
# Of what all slots share [L, K, P, H].
SHARED_AXES = (None, "tensor", None, None)


# Lengths of caches are multiples of it, see `scheduler.FEWEST_NUMBERS`.
CACHE_STEP = 64


@dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
      text: the answer as text.
      tokens: its token ids, without the stop token.
      logprob: natural-log probability of the answer, the stop token included; what the model gives
        to these very tokens among all of its vocabulary, summed in float32.
      finished: the model stopped by itself; False when it was cut off at `max_new_tokens`.
      gap: the smallest distance, over the answer's tokens, of the chosen logit from the next best
        one that could have been chosen: where it is below the rounding of the precision, another
        device or batch may answer differently. None when there never was a choice.
      trimmed: the diagnosis was cut, for the prompt did not fit the context.
      label_logprobs: log-probability of each label where labels were scored, else None.
    """

    text: str
    tokens: list[int]
    logprob: float
    finished: bool
    gap: float | None = None
    trimmed: bool = False
    label_logprobs: dict[str, float] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """Where each row stands between two steps. Rows know nothing of each other.

    Attributes:
      last: int32 [B], the newest token, to be run next.
      begun: int32 [B], tokens of the row that stand in the beginning that slots share, 0 for none.
      position: int32 [B], the place of `last` in its row, those tokens counted.
      tokens: int32 [B, M], the answer so far; zeros beyond `counts`.
      counts: int32 [B], tokens of the answer so far.
      logprob, gap: float32 [B], as `Generation` has them; the gap is infinite without a choice.
      finished: bool [B], a stop token was chosen.
      done: bool [B], nothing more is wanted: finished, full, or an empty slot.
      node: int32 [B], place in the trie; 0 without one.
    """

    last: jax.Array
    begun: jax.Array
    position: jax.Array
    tokens: jax.Array
    counts: jax.Array
    logprob: jax.Array
    gap: jax.Array
    finished: jax.Array
    done: jax.Array
    node: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """The slots: `cache` holds keys and values of all tokens up to, not including, `rows.last`,
    but for the first `rows.begun`."""

    cache: Cache
    rows: Rows


def new_rows(begun: jax.Array, position: jax.Array, done: jax.Array, max_new_tokens: int) -> Rows:
    """Rows without an answer yet; `position` is where the first token of it will stand."""
    (count,) = position.shape
    return Rows(
        last=jnp.zeros(count, jnp.int32),
        begun=begun.astype(jnp.int32),
        position=position.astype(jnp.int32),
        tokens=jnp.zeros((count, max_new_tokens), jnp.int32),
        counts=jnp.zeros(count, jnp.int32),
        logprob=jnp.zeros(count, jnp.float32),
        gap=jnp.full(count, jnp.inf, jnp.float32),
        finished=jnp.zeros(count, bool),
        done=done,
        node=jnp.zeros(count, jnp.int32),
    )


def cache_length(length: int) -> int:
    """`length` rounded up to what a cache has."""
    return -(-length // CACHE_STEP) * CACHE_STEP


def new_cache(
    config: ModelConfig, dtype, rows: int, length: int, *, by_layer: bool = False
) -> Cache:
    """An empty cache [L, rows, K, length, H], or with `by_layer` the tuples of single layers.

    The length is rounded up, and may then exceed the context: no position beyond that is used.
    """
    length = cache_length(length)
    shape = (rows, config.num_kv_heads, length, config.head_dim)

    def zeros():
        if by_layer:
            return tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers))
        array = jnp.zeros((config.num_layers, *shape), dtype)
        return parallel.constrain(array, *CACHE_AXES)

    return Cache(zeros(), zeros())


def empty(
    config: ModelConfig, dtype, slots: int, length: int, max_new_tokens: int, by_layer: bool
) -> State:
    """Empty slots of `length` positions each, rounded up."""
    none, done = jnp.zeros(slots, jnp.int32), jnp.ones(slots, bool)
    rows = new_rows(none, none, done, max_new_tokens)
    return State(new_cache(config, dtype, slots, length, by_layer=by_layer), rows)


def choose(rows: Rows, logits: jax.Array, stops: tuple[int, ...], trie: Trie | None) -> Rows:
    """Takes the likeliest token of each row that is not done.

    Args:
      rows: with `position` already that of the token to be chosen.
      logits: float32 [B, V].
      stops: token ids that end an answer.
      trie: the only answers that may be given; None for any.
    """
    size = rows.tokens.shape[1]
    if trie is None:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        best = jnp.max(logits, axis=-1)
        others = jnp.where(jnp.arange(logits.shape[-1]) == token[:, None], -jnp.inf, logits)
        node = rows.node
    else:
        tokens, children, allowed = trie.children(rows.node)
        scores = jnp.take_along_axis(logits, tokens, axis=-1)
        scores = jnp.where(allowed, scores, -jnp.inf)
        pick = jnp.argmax(scores, axis=-1)[:, None]
        token, node, best = (
            jnp.take_along_axis(x, pick, axis=-1)[:, 0] for x in (tokens, children, scores)
        )
        others = jnp.where(jnp.arange(scores.shape[-1]) == pick, -jnp.inf, scores)
    logprob = best - log_total(logits)
    gap = best - jnp.max(others, axis=-1)
    live = ~rows.done
    stopped = live & jnp.isin(token, jnp.asarray(stops, jnp.int32))
    emitted = live & ~stopped
    here = emitted[:, None] & (jnp.arange(size) == rows.counts[:, None])
    counts = rows.counts + emitted
    return replace(
        rows,
        last=jnp.where(live, token, rows.last),
        tokens=jnp.where(here, token[:, None], rows.tokens),
        counts=counts,
        logprob=jnp.where(live, rows.logprob + logprob, rows.logprob),
        gap=jnp.where(live, jnp.minimum(rows.gap, gap), rows.gap),
        finished=rows.finished | stopped,
        done=rows.done | stopped | (counts == size),
        node=jnp.where(live, node, rows.node),
    )


def begin(model: Decoder, tokens: jax.Array, length: jax.Array) -> Cache:
    """Runs the beginning that prompts share.

    Args:
      tokens: int [D, P], rows that are alike, one for each part of a batch; padded on the right.
      length: int32 [], tokens that are no padding.

    Returns:
      Keys and values [L, K, P, H], as of `Beginning`.
    """
    rows, width = tokens.shape
    cache = new_cache(model.config, model.dtype, rows, width)
    places = jnp.arange(width)
    positions = jnp.where(places < length, places, cache.length)
    asking = jnp.broadcast_to(length - 1, (rows, 1))
    _, cache = model(tokens, jnp.broadcast_to(positions, tokens.shape), cache=cache, asking=asking)
    return jax.tree.map(lambda x: x[:, 0, :, :width], cache)


def beginning_of(shared: Cache | None, counts: jax.Array) -> Beginning | None:
    return None if shared is None else Beginning(shared.key, shared.value, counts)


def run_prompts(
    model: Decoder,
    beginning: Beginning | None,
    tokens: jax.Array,
    lengths: jax.Array,
    spare: int = 0,
) -> tuple[jax.Array, Cache]:
    """Runs prompts whose beginning may have been run before.

    Padding is known by `lengths` alone: any token id may stand anywhere in a prompt.

    Args:
      model: with dropout off.
      beginning: what stands before the tokens; None for nothing.
      tokens: int [R, T], padded on the right with any id.
      lengths: int [R], tokens that are no padding; 0 marks a filler row.
      spare: further positions of the cache to be returned.

    Returns:
      logits float32 [R, V] after each row's last token, and the cache [L, R, K, S, H] of these
      tokens, S at least T + spare.
    """
    rows, width = tokens.shape
    cache = new_cache(model.config, model.dtype, rows, width + spare)
    places = jnp.arange(width)
    # Padding gets a position beyond the cache, so that it is written nowhere.
    positions = jnp.where(places < lengths[:, None], places, cache.length)
    if beginning is not None:
        positions += beginning.counts[:, None]
    # The head is the widest matrix of the model: only the last position of a row needs it.
    last = jnp.maximum(lengths - 1, 0)
    hidden, cache = model(tokens, positions, cache=cache, asking=last[:, None], beginning=beginning)
    return model.logits(hidden, exact=True)[:, 0], cache


def admit(
    model: Decoder,
    state: State,
    shared: Cache | None,
    begun: jax.Array,
    tokens: jax.Array,
    lengths: jax.Array,
    slots: jax.Array,
    stops: tuple[int, ...],
    trie: Trie | None,
) -> State:
    """Runs R prompts, chooses their first tokens and puts them into slots.

    Prompts and slots are each D parts, one after the other, of which a device has its own: a
    prompt goes into a slot of its own part, so that no keys and values move between devices.

    Args:
      model, tokens, lengths: as of `run_prompts`.
      state: B slots.
      shared: from `begin`; None where the prompts do not begin so.
      begun: int32 [], tokens of it.
      slots: int [D, R / D], counted within the part, each another one; beyond its B / D slots for
        filler rows.
      stops, trie: as of `choose`.
    """
    begun = jnp.full_like(lengths, begun)
    logits, cache = run_prompts(model, beginning_of(shared, begun), tokens, lengths)
    rows = new_rows(begun, begun + lengths, lengths == 0, state.rows.tokens.shape[1])
    rows = choose(rows, logits, stops, trie)

    length = min(cache.length, state.cache.length)  # what is cut off is rounding

    def place(all_slots, new):
        # Zeros behind it: what another prompt left there may be infinite, and a weight of zero
        # would not keep it out of a sum.
        behind = [(0, 0)] * 3 + [(0, state.cache.length - length), (0, 0)]
        new = jnp.pad(new[:, :, :, :length], behind)
        if isinstance(all_slots, tuple):  # of single layers
            return tuple(
                put(layer, part, slots, 0) for layer, part in zip(all_slots, new, strict=True)
            )
        return put(all_slots, new, slots, 1)

    return State(
        Cache(place(state.cache.key, cache.key), place(state.cache.value, cache.value)),
        jax.tree.map(lambda old, new: put(old, new, slots, 0), state.rows, rows),
    )


def put(array: jax.Array, new: jax.Array, slots: jax.Array, axis: int) -> jax.Array:
    """Writes rows into slots; `slots` as of `admit`.

    Args:
      array: [..., B, ...], B being its dimension `axis`.
      new: [..., R, ...], like `array` in the others.
    """
    parts = len(slots)

    def split(x):
        return x.reshape(*x.shape[:axis], parts, x.shape[axis] // parts, *x.shape[axis + 1 :])

    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(*range(axis), *range(axis + 2, array.ndim + 1)),
        inserted_window_dims=(axis + 1,),
        scatter_dims_to_operand_dims=(axis + 1,),
        operand_batching_dims=(axis,),
        scatter_indices_batching_dims=(0,),
    )
    mode = jax.lax.GatherScatterMode.FILL_OR_DROP
    written = jax.lax.scatter(split(array), slots[..., None], split(new), numbers, mode=mode)
    return written.reshape(array.shape)


def advance(
    model: Decoder,
    blocks,
    state: State,
    shared: Cache | None,
    stops: tuple[int, ...],
    trie: Trie | None,
) -> State:
    """One step: runs `last` of every row and chooses the next token of those not done.

    `blocks`: as of `Decoder`; `shared`: the beginning of some rows or all, of single layers where
    the cache is.
    """
    rows = state.rows
    hidden, cache = model(
        rows.last[:, None],
        rows.position[:, None],
        cache=state.cache,
        blocks=blocks,
        beginning=beginning_of(shared, rows.begun),
    )
    rows = replace(rows, position=jnp.where(rows.done, rows.position, rows.position + 1))
    return State(cache, choose(rows, model.logits(hidden, exact=True)[:, 0], stops, trie))


def decode(
    step: Callable[[State], State], state: State, parts: int, wanted: jax.Array, each: jax.Array
) -> tuple[State, jax.Array]:
    """Steps until `wanted` slots have nothing more to do, of which at most `each` count in each of
    the `parts` of `admit`; (state, number of steps, int32 [])."""

    def going_on(carry):
        free = jnp.sum(carry[0].rows.done.reshape(parts, -1), axis=1)
        return jnp.sum(jnp.minimum(free, each)) < wanted

    def one(carry):
        state, steps = carry
        return step(state), steps + 1

    return jax.lax.while_loop(going_on, one, (state, jnp.int32(0)))
