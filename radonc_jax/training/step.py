"""One optimiser step, pure: state in, state out. Only the trainable part is differentiated."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from radonc_jax import parallel
from radonc_jax.models.lora import Partition


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
    )


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


def fingerprint(tree) -> str:
    """A checksum of all bits of a tree of arrays, computed where they lie.

    Each array's bits are summed as unsigned integers under position-dependent odd weights, modulo
    2**32; equal trees give equal strings, and a changed bit changes the string.
    """

    return "".join(f"{int(value):08x}" for value in _checksums(jax.tree.leaves(tree)))


@jax.jit
def _checksums(leaves: list[jax.Array]) -> list[jax.Array]:
    def checksum(leaf):
        width = jnp.dtype(leaf.dtype).itemsize * 8
        bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{width}"))
        bits = bits.astype(jnp.uint32).ravel()
        weights = jnp.arange(bits.size, dtype=jnp.uint32) * jnp.uint32(2654435762) + 1
        return jnp.sum(bits * weights, dtype=jnp.uint32)

    return [checksum(leaf) for leaf in leaves]
