"""One optimiser step, pure: state in, state out. Only the trainable part is differentiated."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from radonc_jax import compiler, parallel
from radonc_jax.models.lora import Partition

FINGERPRINT = "2:"  # version of the fingerprints, which stands before them


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What training changes, and all that a checkpoint holds besides the position.

    Attributes:
      step: int32 [], optimiser steps done.
      trainable: the adapter, or in full-parameter mode the model; float32.
      optimizer: Optax state.
    """

    step: jax.Array
    trainable: nnx.State
    optimizer: optax.OptState


def answer_loss(model, batch: dict[str, jax.Array]) -> jax.Array:
    """Summed cross-entropy over answer tokens.

    The last layer and the head run at answer positions only: there alone is a loss.

    Args:
      model: a Decoder.
      batch: one microbatch of `data.batches.Batches`, arrays [R, T] and [R, M].

    Returns:
      float32 [].
    """
    hidden, _ = model(
        batch["tokens"], batch["positions"], batch["segment_ids"], asking=batch["answer_index"]
    )
    logits = model.logits(hidden)  # [R, M, V]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    return jnp.sum(losses * batch["weights"])


def train_step(
    partition: Partition,
    optimizer: optax.GradientTransformation,
    seed: int,
    state: TrainState,
    base: nnx.State,
    batch: dict[str, jax.Array],
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step: the loss is the sum over answer tokens over their number in the whole batch.

    Args:
      partition: how trainable and base make a model.
      optimizer: from `optimizer.make_optimizer`.
      seed: of dropout.
      state: donated by the caller.
      base: frozen; not differentiated, not donated, not saved.
      batch: arrays with a leading axis of microbatches.

    Returns:
      The new state; `loss`, `answer_tokens` and `gradient_norm` (before clipping), float32 [].
    """
    tokens = jnp.sum(batch["weights"])
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    dropout = bool(jax.tree.leaves(partition.keys))

    def microbatch_loss(trainable, number, microbatch):
        dropout_key = jax.random.fold_in(key, number) if dropout else None
        model = partition.merge(trainable, base, dropout_key)
        return answer_loss(model, microbatch) / tokens

    def accumulate(carry, inputs):
        loss, gradients = jax.value_and_grad(microbatch_loss)(state.trainable, *inputs)
        return jax.tree.map(jnp.add, carry, (loss, gradients)), None

    start = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.trainable))
    numbers = jnp.arange(batch["tokens"].shape[0])
    (loss, gradients), _ = jax.lax.scan(accumulate, start, (numbers, batch))
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)
    metrics = {
        "loss": loss,
        "answer_tokens": tokens,
        "gradient_norm": optax.tree.norm(gradients),
    }
    return TrainState(state.step + 1, trainable, optimizer_state), metrics


def jit_train_step(
    partition: Partition, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh
):
    """`train_step` as a run uses it, (state, base, batch) -> (state, metrics): jitted for a mesh,
    its state donated and kept in its places, its metrics on every device."""
    _, placements = state_shardings(partition, optimizer, mesh)
    return jax.jit(
        functools.partial(train_step, partition, optimizer, seed),
        donate_argnums=0,
        out_shardings=(placements, parallel.replicated(mesh)),
        compiler_options=_compiler_options(partition, mesh),
    )


def jit_evaluation_step(partition: Partition, mesh: Mesh):
    """`evaluation_step`, (trainable, base, batch) -> sums, jitted for a mesh."""
    return jax.jit(
        functools.partial(evaluation_step, partition),
        out_shardings=parallel.replicated(mesh),
        compiler_options=_compiler_options(partition, mesh),
    )


def _compiler_options(partition: Partition, mesh: Mesh) -> dict | None:
    unrolled = partition.merge(partition.trainable, partition.frozen).execution.unrolled
    work = "training" if unrolled else "training by a loop"
    return compiler.options(mesh.devices.flat[0], work)


def evaluation_step(partition: Partition, trainable, base, batch) -> dict[str, jax.Array]:
    """Summed loss and number of answer tokens of a batch, to be divided once at the end."""
    model = partition.merge(trainable, base)

    def add(total, microbatch):
        return total + answer_loss(model, microbatch), None

    loss, _ = jax.lax.scan(add, jnp.zeros(()), batch)
    return {"loss_sum": loss, "answer_tokens": jnp.sum(batch["weights"])}


def state_shardings(
    partition: Partition, optimizer: optax.GradientTransformation, mesh: Mesh
) -> tuple[TrainState, TrainState]:
    """Shapes and placements of the whole train state, all from the one placement table."""
    shapes = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32),
        partition.trainable,
        jax.eval_shape(optimizer.init, partition.trainable),
    )
    placements = TrainState(
        parallel.replicated(mesh),
        parallel.shardings(shapes.trainable, mesh),
        parallel.shardings(shapes.optimizer, mesh, optimizer=True),
    )
    return shapes, placements


def fingerprint(tree, like: str = FINGERPRINT) -> str:
    """A checksum of all bits of a tree of arrays, computed where they lie.

    Each element's bits are mixed with its place by murmur3's 32-bit finaliser (Appleby 2011, public
    domain), which no sign, factor or exchange passes unseen, and the results are added modulo
    2**32, twice in two ways: so 64 bits an array, the same however the arrays are spread over
    devices. The fingerprint of a tree without arrays is empty.

    Args:
      tree: of arrays.
      like: a fingerprint that this one is to be compared with. Those of older versions (without
        `FINGERPRINT` before them) are weighted sums, blind to an even number of changed signs and
        to most powers of two; such a one is answered in its own way.
    """
    return join_checksums(checksums(jax.tree.leaves(tree), like), like)


def checksums(arrays: Sequence, like: str = FINGERPRINT) -> list[str]:
    """The part of each array in a `fingerprint`."""
    sums = _mixed_sums if like.startswith(FINGERPRINT) else _weighted_sums
    words = jax.device_get(sums(list(arrays)))
    return ["".join(f"{int(word):08x}" for word in own) for own in words]


def join_checksums(parts: Sequence[str], like: str = FINGERPRINT) -> str:
    """The fingerprint of a tree of which `parts` has the checksum of each leaf, in order."""
    return FINGERPRINT * bool(parts and like.startswith(FINGERPRINT)) + "".join(parts)


@jax.jit
def _mixed_sums(arrays: list) -> list[tuple[jax.Array, jax.Array]]:
    golden = jnp.uint32(0x9E3779B9)

    def mix(word):
        word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
        word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
        return word ^ (word >> 16)

    def add(words, axes):
        # By index along each axis and not reshaped, which would gather what lies on other devices.
        place = jnp.full(words.shape, golden)
        for axis in axes:
            stride = math.prod(words.shape[axis + 1 :])
            place += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride)
        first = mix(words ^ mix(place))
        return tuple(jnp.sum(w, axes, dtype=jnp.uint32) for w in (first, mix(first + golden)))

    def sums(array):
        # Each row along the leading axis (of a stack, a layer) apart: all of them may be more
        # elements than 32 bits can count.
        bits = jnp.atleast_1d(_bits(array))
        first, second = add(bits, tuple(range(1, bits.ndim)))
        return add(first, (0,))[0], add(second, (0,))[1]

    return [sums(array) for array in arrays]


@jax.jit
def _weighted_sums(arrays: list) -> list[tuple[jax.Array]]:
    def total(array):
        bits = _bits(array).ravel()
        weights = jnp.arange(bits.size, dtype=jnp.uint32) * jnp.uint32(2654435762) + 1
        return (jnp.sum(bits * weights, dtype=jnp.uint32),)

    return [total(array) for array in arrays]


def _bits(array) -> jax.Array:
    width = jnp.dtype(array.dtype).itemsize * 8
    return jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{width}")).astype(jnp.uint32)
