"""Answers from a closed set: a trie of token ids on the device, and labels scored one by one.

The log-probability of a constrained answer is the model's own, among all of its vocabulary: it
says how much the model believed in the answer, not that the answer was one of the set.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np

from radonc_jax.models.products import ordered_sum

CODES = ("table", "cohort")  # where the ICD-10-CM codes come from that may be answered


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Trie:
    """Sequences of token ids, merged where they begin alike; node 0 is the root.

    Attributes:
      first: int32 [N], the first of a node's edges, which lie side by side.
      count: int32 [N], how many there are.
      token: int32 [E], of each edge; edge e leads to node e + 1.
      width: most edges of a node.
      depth: most edges of a path.
    """

    first: jax.Array
    count: jax.Array
    token: jax.Array
    width: int = field(metadata={"static": True})
    depth: int = field(metadata={"static": True})

    def children(self, node: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of nodes [B]: token ids and child nodes, int32 [B, width], and which of them are real."""
        places = jnp.arange(self.width)
        real = places < self.count[node][:, None]
        edge = jnp.where(real, self.first[node][:, None] + places, 0)
        return self.token[edge], edge + 1, real


def build_trie(sequences: Iterable[Sequence[int]]) -> Trie:
    """The trie of sequences, each of which ends in a token that stands nowhere else in any.

    Raises:
      ValueError: there are no sequences, or one is the beginning of another.
    """
    ordered = sorted({tuple(sequence) for sequence in sequences})
    if not ordered or not ordered[0]:
        raise ValueError("a trie needs sequences, none of them empty")
    first, count, token = [0], [0], []
    # Level by level, so that the edges of a node lie side by side. A node is the range of the
    # sorted sequences that go through it.
    level, depth = [(0, 0, len(ordered))], 0
    while level:
        following = []
        for node, start, stop in level:
            first[node] = len(token)
            while start < stop:
                end, value = start, ordered[start][depth]
                while end < stop and ordered[end][depth] == value:
                    end += 1
                token.append(value)
                count[node] += 1
                first.append(0)
                count.append(0)
                if len(ordered[start]) == depth + 1:
                    if end > start + 1:
                        raise ValueError("a sequence is the beginning of another one")
                else:
                    following.append((len(token), start, end))
                start = end
        level, depth = following, depth + 1
    arrays = (np.asarray(array, np.int32) for array in (first, count, token))
    return Trie(*arrays, width=max(count), depth=depth)


def log_total(logits: jax.Array) -> jax.Array:
    """logsumexp over the last axis, whose sum does not depend on the other rows."""
    top = jnp.max(logits, axis=-1)
    return top + jnp.log(ordered_sum(jnp.exp(logits - top[..., None]))[..., 0])


def score_labels(
    model,
    logits: jax.Array,
    cache,
    beginning,
    positions: jax.Array,
    labels: jax.Array,
    lengths: jax.Array,
) -> jax.Array:
    """Log-probability of every label after every prompt.

    Args:
      model: with dropout off.
      logits: float32 [R, V] after each prompt.
      cache: of the prompts [L, R, ...], with room for a label behind each.
      beginning: what stands before it, or None.
      positions: int [R], where a label begins.
      labels: int [C, W], with the stop token, padded on the right.
      lengths: int [C].

    Returns:
      float32 [R, C].
    """
    count, width = labels.shape
    rows = logits.shape[0]
    cache = jax.tree.map(lambda x: jnp.repeat(x, count, axis=1), cache)
    if beginning is not None:
        beginning = replace(beginning, counts=jnp.repeat(beginning.counts, count))
    tokens = jnp.tile(labels, (rows, 1))  # [R * C, W], the labels of a row side by side
    places = jnp.repeat(positions, count)[:, None] + jnp.arange(width)
    hidden, _ = model(tokens, places, cache=cache, beginning=beginning)
    following = model.logits(hidden, exact=True).reshape(rows, count, width, -1)
    first = jnp.broadcast_to(logits[:, None, None], (rows, count, 1, logits.shape[-1]))
    # What stands before each token of a label: the prompt's end, then the label's own tokens.
    before = jnp.concatenate([first, following[:, :, :-1]], axis=2)
    chosen = jnp.take_along_axis(before, labels[None, :, :, None], axis=-1)[..., 0]
    logprobs = chosen - log_total(before)
    return ordered_sum(jnp.where(jnp.arange(width) < lengths[:, None], logprobs, 0.0))[..., 0]
