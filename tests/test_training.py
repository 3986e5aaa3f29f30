"""The step: exact loss, whatever the cut of the work; the base is never touched."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from radonc_jax import parallel
from radonc_jax.data.batches import BatchConfig, Batches, Example
from radonc_jax.models import lora
from radonc_jax.models.decoder import Decoder, ModelConfig
from radonc_jax.training import step
from radonc_jax.training.optimizer import OptimizerConfig, make_optimizer, make_schedule

CONFIG = ModelConfig(
    vocab_size=96,
    num_layers=3,
    hidden_size=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=64,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    rope_scaling=None,
    sliding_window=11,
    tie_word_embeddings=False,
    max_position_embeddings=128,
)
ADAPTER = lora.LoRAConfig(4, 8.0, 0.0, tuple(lora.PROJECTIONS), False, False)
OPTIMIZER = OptimizerConfig(1e-2, "cosine", 0.2, 0.01, 1.0, 0.9, 0.999)
ONE = parallel.MeshConfig(1, 1, 1)


def examples(count=22, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Example(
            f"case{n}",
            (1, *rng.integers(3, 96, rng.integers(3, 30)).tolist()),
            (*rng.integers(3, 96, rng.integers(0, 9)).tolist(), 2),
        )
        for n in range(count)
    ]


def batch_config(**changes):
    values = dict(examples=8, microbatches=1, sequence_length=64, packing=True, over_length="fail")
    return BatchConfig(**(values | changes))


def start(adapter, seed=0):
    """(partition, trainable, base) of a random model; the adapter's b is not zero."""
    partition = lora.partition(CONFIG, adapter, jnp.float32)
    model = Decoder(CONFIG, rngs=nnx.Rngs(seed))
    if adapter is None:
        return partition, nnx.state(model, nnx.Param), partition.frozen
    lora.inject(model, adapter)
    _, trainable, _, base = nnx.split(model, lora.LoRAParam, lora.DropoutKey, ...)
    keys = iter(jax.random.split(jax.random.key(seed), 100))
    trainable = jax.tree.map(lambda x: 0.1 * jax.random.normal(next(keys), x.shape), trainable)
    return partition, trainable, base


def trace(adapter=ADAPTER, mesh=ONE, devices=None, steps=6, **changes):
    """Loss and gradient norm of each step, and at the end the trained arrays and the base."""
    mesh = parallel.make_mesh(mesh, jax.devices()[:1] if devices is None else devices)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    batches = Batches(examples(), batch_config(**changes), epochs=2, seed=5, row_multiple=shards)
    assert batches.steps == steps  # two epochs of 8 + 8 + 6 examples
    partition, trainable, base = start(adapter)
    optimizer = make_optimizer(OPTIMIZER, steps)
    _, placements = step.state_shardings(partition, optimizer, mesh)
    base = jax.device_put(base, parallel.shardings(base, mesh))
    state = step.TrainState(jnp.int32(0), trainable, optimizer.init(trainable))
    state = jax.device_put(state, placements)
    run = step.jit_train_step(partition, optimizer, 0, mesh)
    seen = []
    with jax.set_mesh(mesh):
        for number in range(steps):
            placed = parallel.put(batches[number], mesh, None, parallel.BATCH_AXES)
            state, metrics = run(state, base, placed)
            seen.append([float(metrics["loss"]), float(metrics["gradient_norm"])])
    return np.array(seen), jax.device_get(state.trainable), base


@functools.cache
def plain_trace():
    return trace()


def assert_same_trace(got):
    """All losses, and the first gradient: later norms carry the rounding of earlier steps."""
    expected, _, _ = plain_trace()
    np.testing.assert_allclose(got[:, 0], expected[:, 0], rtol=1e-5)
    np.testing.assert_allclose(got[0, 1], expected[0, 1], rtol=1e-5)


def cross_entropy(partition, trainable, base, chosen):
    """The slow way: each example alone, all its logits, the mean over all answer tokens.

    Padding after an example, which lets all of them share a compilation, is seen by none of its
    tokens.
    """
    model = partition.merge(trainable, base)
    width = max(example.length for example in chosen) + 1
    tokens, answers = np.zeros((2, len(chosen), width), np.int32)
    for row, example in enumerate(chosen):
        tokens[row, : example.length + 1] = (*example.prompt, *example.answer)
        answers[row, len(example.prompt) : example.length + 1] = 1

    def alone(row):
        tokens, answers = row
        hidden, _ = model(tokens[None, :-1], jnp.arange(width - 1)[None])
        logits = jax.nn.log_softmax(model.logits(hidden)[0])
        return jnp.sum(jnp.take_along_axis(logits, tokens[1:, None], 1)[:, 0] * answers[1:])

    return -jnp.sum(jax.lax.map(alone, (tokens, answers))) / answers.sum()


@pytest.mark.parametrize("adapter", [ADAPTER, None], ids=["lora", "full"])
def test_loss_and_gradients_equal_those_of_each_example_alone(adapter):
    partition, trainable, base = start(adapter)
    settings = batch_config(examples=6, microbatches=2)
    batches = Batches(examples(6), settings, epochs=1, seed=None, row_multiple=1)
    # Some rows hold several examples, and the microbatches differ in their answer tokens.
    assert (batches[0]["segment_ids"] > 1).any()
    assert len(set(batches[0]["weights"].sum((1, 2)))) > 1
    # A step of plain gradient descent tells its gradients.
    optimizer = optax.sgd(0.5)
    state = step.TrainState(jnp.int32(0), trainable, optimizer.init(trainable))
    after, metrics = jax.jit(functools.partial(step.train_step, partition, optimizer, 0))(
        state, base, batches[0]
    )
    gradients = jax.tree.map(lambda old, new: 2 * (old - new), trainable, after.trainable)
    expected, expected_gradients = jax.jit(
        jax.value_and_grad(lambda tree: cross_entropy(partition, tree, base, examples(6)))
    )(trainable)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)
    for value, wanted in zip(
        jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True
    ):
        np.testing.assert_allclose(value, wanted, atol=2e-6, rtol=1e-4)
    squares = sum(float(jnp.sum(g * g)) for g in jax.tree.leaves(expected_gradients))
    np.testing.assert_allclose(metrics["gradient_norm"], squares**0.5, rtol=1e-5)
    evaluate = jax.jit(functools.partial(step.evaluation_step, partition))
    sums = evaluate(trainable, base, batches[0])
    assert sums["answer_tokens"] == sum(len(example.answer) for example in examples(6))
    np.testing.assert_allclose(sums["loss_sum"] / sums["answer_tokens"], expected, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"packing": False},
        {"microbatches": 2},
        {"microbatches": 4},
        {"microbatches": 2, "packing": False},
    ],
    ids=str,
)
def test_loss_trace_does_not_depend_on_packing_or_microbatches(changes):
    assert_same_trace(trace(**changes)[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "order",
    # Turned round, devices would still sum in the same groups; in the last order they do not.
    [range(8), (0, 3, 5, 6, 1, 2, 7, 4)],
    ids=["forward", "mixed"],
)
@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 8, 1), (2, 2, 2)], ids=str)
def test_loss_trace_does_not_depend_on_the_devices(mesh, order):
    devices = [jax.devices()[number] for number in order]
    got, _, _ = trace(mesh=parallel.MeshConfig(*mesh), devices=devices)
    assert_same_trace(got)


def test_only_the_adapter_changes():
    _, trainable, base = start(ADAPTER)
    before = step.fingerprint(base), step.fingerprint(trainable)
    _, trained, same_base = plain_trace()
    assert step.fingerprint(same_base) == before[0]
    assert step.fingerprint(trained) != before[1]
    changed = [
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(trained), jax.tree.leaves(trainable), strict=True)
    ]
    assert all(changed)


def inner_jaxprs(equation):
    for value in equation.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(item, "eqns"):
                yield item
            elif hasattr(item, "jaxpr"):
                yield item.jaxpr


def products(jaxpr) -> set[tuple[int, ...]]:
    """Shapes of all matrix products' outputs, inner programs included."""
    found = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.add(equation.outvars[0].aval.shape)
        for inner in inner_jaxprs(equation):
            found |= products(inner)
    return found


def test_no_gradient_of_the_base_is_computed():
    """Neither given out by the step, nor made on the way: a weight's gradient is a product."""
    optimizer = make_optimizer(OPTIMIZER, 6)
    batch = Batches(examples(), batch_config(), epochs=1, seed=5, row_multiple=1)[0]
    _, _, base = start(ADAPTER)
    matrices = {leaf.shape[-2:] for leaf in jax.tree.leaves(base) if leaf.ndim >= 2}
    matrices |= {shape[::-1] for shape in matrices}

    def step_jaxpr(adapter):
        partition, trainable, base = start(adapter)
        state = step.TrainState(jnp.int32(0), trainable, optimizer.init(trainable))
        run = functools.partial(step.train_step, partition, optimizer, 0)
        return jax.make_jaxpr(run)(state, base, batch)

    closed = step_jaxpr(ADAPTER)
    given = {aval.shape[-2:] for aval in closed.out_avals}
    assert not given & matrices
    assert not products(closed.jaxpr) & matrices
    # Where the base trains, both are seen.
    closed = step_jaxpr(None)
    assert matrices & {aval.shape[-2:] for aval in closed.out_avals}
    assert matrices & products(closed.jaxpr)


def test_fingerprint_sees_one_bit_and_an_exchange():
    tree = {"a": jnp.arange(1000, dtype=jnp.float32), "b": jnp.ones(7, jnp.bfloat16)}
    before = step.fingerprint(tree)
    assert step.fingerprint(tree) == before
    bits = jax.lax.bitcast_convert_type(tree["a"], jnp.uint32).at[500].add(1)
    flipped = tree | {"a": jax.lax.bitcast_convert_type(bits, jnp.float32)}
    assert step.fingerprint(flipped) != before
    last = tree | {"b": tree["b"].at[6].set(1 + 2**-7)}
    assert step.fingerprint(last) != before
    swapped = tree | {"a": tree["a"].at[jnp.array([3, 4])].set(tree["a"][jnp.array([4, 3])])}
    assert step.fingerprint(swapped) != before


def changed_trees(tree):
    """Name and tree of each way to change float32 arrays that a sum of bits may not see."""
    a, b = tree["a"], tree["b"]
    flat = a.ravel()
    pair, far = jnp.array([5, 77]), jnp.array([3, 2000])
    yield "negated", {"a": -a, "b": -b}
    for factor in (0.5, 2.0, 4.0):
        yield f"times {factor}", {"a": factor * a, "b": factor * b}
    yield "two signs", tree | {"a": flat.at[pair].multiply(-1).reshape(a.shape)}
    yield "exchanged", tree | {"a": flat.at[far].set(flat[far[::-1]]).reshape(a.shape)}
    yield "one layer negated", tree | {"a": a.at[1].multiply(-1)}
    yield "layers exchanged", tree | {"a": a[::-1]}
    yield "transposed", tree | {"a": jnp.swapaxes(a, 1, 2).reshape(a.shape)}
    yield "one bit of a vector", tree | {"b": b.at[-1].set(jnp.nextafter(b[-1], 9.0))}


def tree_of_floats():
    keys = jax.random.split(jax.random.key(0))
    return {"a": jax.random.normal(keys[0], (4, 16, 64)), "b": jax.random.normal(keys[1], (64,))}


def test_fingerprint_sees_signs_factors_exchanges_and_layers():
    tree = tree_of_floats()
    for dtype in (jnp.float32, jnp.bfloat16):

        def printed(arrays, dtype=dtype):
            return step.fingerprint(jax.tree.map(lambda x: x.astype(dtype), arrays))

        seen = {"as it was": printed(tree)} | {
            name: printed(changed)
            for name, changed in changed_trees(tree)
            if dtype == jnp.float32 or "bit" not in name
        }
        assert all(value.startswith("2:") for value in seen.values())
        assert len(set(seen.values())) == len(seen), seen
    # Each of an array's two sums sees them too: together they are 64 bits.
    for half in (slice(0, 8), slice(8, 16)):
        parts = [
            tuple(part[half] for part in step.checksums(jax.tree.leaves(changed)))
            for changed in (tree, *(changed for _, changed in changed_trees(tree)))
        ]
        assert len(set(parts)) == len(parts)
    assert step.fingerprint({}) == ""
    assert step.fingerprint(jnp.int32(3)) != step.fingerprint(jnp.int32(4))


def test_fingerprint_does_not_depend_on_the_devices():
    tree = tree_of_floats()
    expected = step.fingerprint(tree)
    mesh = parallel.make_mesh(parallel.MeshConfig(2, 2, 2), jax.devices()[:8])
    both = ("data", "tensor")
    for a, b in ((("data", "fsdp"), (both,)), (("tensor", None, "data"), ()), ((None, both), ())):
        specs = {"a": jax.P(*a), "b": jax.P(*b)}
        placements = {name: jax.NamedSharding(mesh, spec) for name, spec in specs.items()}
        assert step.fingerprint(jax.device_put(tree, placements)) == expected


def test_a_fingerprint_of_the_version_before_is_answered_in_its_way():
    """Its value is that of the release which wrote it; a changed bit is seen as it was then."""
    array = jnp.arange(6, dtype=jnp.float32).reshape(2, 3)
    old = step.fingerprint(array, "00000000")
    bits = np.asarray(array).view(np.uint32).ravel()
    weights = np.arange(6, dtype=np.uint32) * np.uint32(2654435762) + np.uint32(1)
    assert old == f"{int((bits * weights).sum(dtype=np.uint32)):08x}"
    assert step.fingerprint(array.at[0, 1].add(1), old) != old
    assert step.fingerprint(array, step.fingerprint(array)) == step.fingerprint(array) != old


def test_dropout_is_drawn_anew_for_each_step_microbatch_and_seed():
    adapter = lora.LoRAConfig(4, 8.0, 0.5, ("q_proj", "down_proj"), False, False)
    partition, trainable, base = start(adapter)
    optimizer = optax.sgd(1.0)
    batch = Batches(examples(6), batch_config(), epochs=1, seed=None, row_multiple=1)[0]
    # The same rows in two microbatches, of which the second may be left out of the loss.
    twice = jax.tree.map(lambda array: np.concatenate([array, array]), batch)
    once = twice | {"weights": np.concatenate([batch["weights"], 0 * batch["weights"]])}

    @jax.jit
    def run(seed, number, batch):
        state = step.TrainState(number, trainable, optimizer.init(trainable))
        after, metrics = step.train_step(partition, optimizer, seed, state, base, batch)
        return metrics["loss"], after.step

    first, number = run(0, 7, once)
    assert number == 8
    assert run(0, 7, once)[0] == first
    for other in (run(0, 8, once), run(1, 7, once), run(0, 7, twice)):
        assert abs(float(other[0] - first)) > 1e-4


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedule_rises_then_falls(schedule):
    rate = make_schedule(OptimizerConfig(0.1, schedule, 0.1, 0, 1, 0.9, 0.999), 100)
    values = np.array([rate(s) for s in range(100)])
    np.testing.assert_allclose(values[:10], 0.1 * np.arange(1, 11) / 10, rtol=1e-5)
    falling = values[10:]
    if schedule == "constant":
        np.testing.assert_allclose(falling, 0.1, rtol=1e-6)
    else:
        assert (np.diff(falling) < 1e-9).all() and falling[-1] < 0.002
    if schedule == "linear":
        np.testing.assert_allclose(falling, 0.1 * (1 - np.arange(90) / 90), atol=1e-6)


@pytest.mark.parametrize("clip_norm", [1.0, 0.0])
def test_updates_are_those_of_adamw_on_clipped_gradients(clip_norm):
    """Against Loshchilov and Hutter 2019, algorithm 2, written out in float64."""
    config = OptimizerConfig(0.1, "cosine", 0.25, 0.1, clip_norm, 0.8, 0.95)
    steps = 8
    optimizer, rate = make_optimizer(config, steps), make_schedule(config, steps)
    rng = np.random.default_rng(0)
    weights = rng.standard_normal(12)
    got = {"w": jnp.asarray(weights, jnp.float32)}
    state = optimizer.init(got)
    first = second = np.zeros(12)
    norms = []
    for number in range(steps):
        gradient = rng.standard_normal(12) * (0.1 if number % 2 else 10.0)
        updates, state = optimizer.update({"w": jnp.asarray(gradient, jnp.float32)}, state, got)
        got = optax.apply_updates(got, updates)
        norms.append(np.linalg.norm(gradient))
        if clip_norm:
            gradient = gradient * min(1.0, clip_norm / norms[-1])
        first = config.b1 * first + (1 - config.b1) * gradient
        second = config.b2 * second + (1 - config.b2) * gradient**2
        moment = first / (1 - config.b1 ** (number + 1))
        scale = np.sqrt(second / (1 - config.b2 ** (number + 1))) + 1e-8
        weights = weights - float(rate(number)) * (moment / scale + config.weight_decay * weights)
        np.testing.assert_allclose(got["w"], weights, rtol=2e-5, atol=2e-6)
    assert min(norms) < 1 < max(norms)


@pytest.mark.long
def test_training_learns_its_examples():
    """After enough steps the eight examples are known: loss near zero."""
    partition, trainable, base = start(None)
    optimizer = make_optimizer(OptimizerConfig(5e-3, "constant", 0, 0, 1, 0.9, 0.999), 150)
    batches = Batches(examples(8), batch_config(), epochs=150, seed=0, row_multiple=1)
    state = step.TrainState(jnp.int32(0), trainable, optimizer.init(trainable))
    run = jax.jit(functools.partial(step.train_step, partition, optimizer, 0))
    losses = []
    for number in range(batches.steps):
        state, metrics = run(state, base, batches[number])
        losses.append(float(metrics["loss"]))
    assert losses[0] > 4 and losses[-1] < 0.15
