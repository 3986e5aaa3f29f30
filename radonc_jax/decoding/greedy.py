"""Greedy decoding: one prefill, then one token a step for all rows over a cache.

Everything here is pure and runs inside one `jax.jit`; prompts, batches and text are the business
of `scheduler`. Axes: B batch, T prompt, M new tokens, S = T + M cache slots, V vocabulary.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from radonc_jax import parallel
from radonc_jax.models.decoder import Cache, Decoder


@dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
      text: the answer as text.
      tokens: its token ids, without the stop token.
      logprob: natural-log probability of the answer, the stop token included; what the model gives
        to these very tokens, summed in float32.
      finished: the model stopped by itself; False when it was cut off at `max_new_tokens`.
    """

    text: str
    tokens: list[int]
    logprob: float
    finished: bool


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Where each row stands between two steps. Rows know nothing of each other.

    Attributes:
      cache: keys and values of the prompt and of all tokens up to, not including, `last`.
      last: int32 [B], the newest token, to be run next.
      position: int32 [B], the place of `last` in its row.
      tokens: int32 [B, M], the answer so far; zeros beyond `counts`.
      counts: int32 [B], tokens of the answer so far.
      logprob: float32 [B].
      finished: bool [B], a stop token was chosen.
      done: bool [B], nothing more is wanted: finished, full, or a filler row.
    """

    cache: Cache
    last: jax.Array
    position: jax.Array
    tokens: jax.Array
    counts: jax.Array
    logprob: jax.Array
    finished: jax.Array
    done: jax.Array


def choose(state: State, logits: jax.Array, stops: tuple[int, ...]) -> State:
    """Takes the likeliest token of each row that is not done.

    Args:
      state: with `position` already that of the token to be chosen.
      logits: float32 [B, V].
      stops: token ids that end an answer.
    """
    size = state.tokens.shape[1]
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logprob = jnp.max(logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1)
    live = ~state.done
    stopped = live & jnp.isin(token, jnp.asarray(stops, jnp.int32))
    emitted = live & ~stopped
    rows = jnp.arange(token.shape[0])
    # Rows that emit nothing write beyond the end, which is dropped.
    column = jnp.where(emitted, state.counts, size)
    counts = state.counts + emitted
    return replace(
        state,
        last=jnp.where(live, token, state.last),
        tokens=state.tokens.at[rows, column].set(token, mode="drop"),
        counts=counts,
        logprob=jnp.where(live, state.logprob + logprob, state.logprob),
        finished=state.finished | stopped,
        done=state.done | stopped | (counts == size),
    )


def prefill(
    model: Decoder,
    tokens: jax.Array,
    lengths: jax.Array,
    *,
    max_new_tokens: int,
    stops: tuple[int, ...],
) -> State:
    """Runs the prompts and chooses each row's first token; arguments as those of `greedy`."""
    batch, length = tokens.shape
    cache = model.init_cache(batch, length + max_new_tokens)
    heads = (None, parallel.BATCH_AXES, None, "tensor", None)
    cache = Cache(parallel.constrain(cache.key, *heads), parallel.constrain(cache.value, *heads))
    # Padding gets a position beyond the cache, so that it is written nowhere.
    positions = jnp.where(jnp.arange(length) < lengths[:, None], jnp.arange(length), cache.length)
    # The head is the widest matrix of the model: only the last position of a row needs it.
    last = jnp.maximum(lengths - 1, 0)
    hidden, cache = model(tokens, positions, cache=cache, asking=last[:, None])
    state = State(
        cache=cache,
        last=jnp.zeros(batch, jnp.int32),
        position=lengths.astype(jnp.int32),
        tokens=jnp.zeros((batch, max_new_tokens), jnp.int32),
        counts=jnp.zeros(batch, jnp.int32),
        logprob=jnp.zeros(batch, jnp.float32),
        finished=jnp.zeros(batch, bool),
        done=lengths == 0,
    )
    return choose(state, model.logits(hidden[:, 0]), stops)


def advance(model: Decoder, state: State, stops: tuple[int, ...]) -> State:
    """One step: runs `last` of every row and chooses the next token of those not done."""
    hidden, cache = model(state.last[:, None], state.position[:, None], cache=state.cache)
    position = jnp.where(state.done, state.position, state.position + 1)
    state = replace(state, cache=cache, position=position)
    return choose(state, model.logits(hidden[:, 0]), stops)


def greedy(
    model: Decoder,
    tokens: jax.Array,
    lengths: jax.Array,
    *,
    max_new_tokens: int,
    stops: tuple[int, ...],
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The likeliest next token of every row, again and again, until all rows are done.

    Padding is known by `lengths` alone: any token id may stand anywhere in a prompt. A row's
    answer does not depend on what the other rows hold.

    Args:
      model: with dropout off.
      tokens: int [B, T], prompts padded on the right with any id.
      lengths: int [B], tokens of each prompt; 0 marks a filler row, which emits nothing.
      max_new_tokens: M, at least 1; a stop token counts, so a row that ends itself in time has at
        most M - 1 tokens before it.
      stops: token ids that end an answer; empty to always go on to the end.

    Returns:
      tokens int32 [B, M] (without stop tokens, zeros beyond `counts`), counts int32 [B],
      logprob float32 [B] (sum over the chosen tokens, the stop token included) and finished
      bool [B] (a stop token was chosen).

    Raises:
      ValueError: T + M exceeds the model's context, or M is below 1.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    state = prefill(model, tokens, lengths, max_new_tokens=max_new_tokens, stops=stops)
    state = jax.lax.while_loop(
        lambda state: ~jnp.all(state.done),
        lambda state: advance(model, state, stops),
        state,
    )
    return state.tokens, state.counts, state.logprob, state.finished
