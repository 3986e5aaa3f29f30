"""What the training step costs, counted from its own program: no device is needed for that.

Model shapes are those of Mistral-7B; nothing here holds its weights.
"""

import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.interpreters import partial_eval
from test_parallel import SEVEN_B
from test_training import (
    ADAPTER,
    CONFIG,
    ONE,
    OPTIMIZER,
    batch_config,
    examples,
    inner_jaxprs,
    start,
)

from radonc_jax import parallel
from radonc_jax.data.batches import Batches
from radonc_jax.models import attention, lora
from radonc_jax.models.attention import AttentionConfig
from radonc_jax.models.decoder import SAVED_NAMES, Execution
from radonc_jax.training import meters, preflight, step
from radonc_jax.training.optimizer import make_optimizer

ROWS, LENGTH, ANSWERS = 2, 2048, 232  # 11 % of the tokens are answers
ALL = lora.LoRAConfig(16, 32.0, 0.0, tuple(lora.PROJECTIONS), False, False)
DORA = replace(ALL, dora=True)
XLA, SPLASH = AttentionConfig(), AttentionConfig("splash")
CUDNN = AttentionConfig("cudnn", segments=17, segment_length=512)
PACKED = AttentionConfig("cudnn_packed", segments=17)


def weight_flops(jaxpr) -> float:
    """FLOPs of all products without batch dimensions: those with weights, not attention's own."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), (batch, _) = equation.params["dimension_numbers"]
            if not batch:
                shape = equation.invars[0].aval.shape
                inner = math.prod(shape[axis] for axis in contracted)
                total += 2.0 * inner * math.prod(equation.outvars[0].aval.shape)
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        total += times * sum(weight_flops(inner) for inner in inner_jaxprs(equation))
    return total


def seven_b(recompute="nothing", attention=XLA, adapter=ALL):
    """(partition, shapes of trainable, base and one microbatch)."""
    execution = Execution(attention, recompute)
    partition = lora.partition(SEVEN_B, adapter, jnp.bfloat16, execution=execution)
    base = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), partition.frozen)
    mesh = parallel.make_mesh(ONE, jax.devices()[:1])
    batch = preflight.batch_shapes(mesh, 1, ROWS, LENGTH, ANSWERS)
    return partition, partition.trainable, base, batch


def step_flops_per_token(recompute, adapter=ALL):
    partition, trainable, base, batch = seven_b(recompute, adapter=adapter)
    optimizer = make_optimizer(OPTIMIZER, 10)
    state = step.TrainState(
        jax.ShapeDtypeStruct((), jnp.int32), trainable, jax.eval_shape(optimizer.init, trainable)
    )
    traced = jax.make_jaxpr(functools.partial(step.train_step, partition, optimizer, 0))(
        state, base, batch
    )
    # What nothing uses is not computed: the compiler drops it, and so does this.
    jaxpr, _ = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
    return weight_flops(jaxpr) / (ROWS * LENGTH)


def test_no_product_with_weights_runs_twice():
    """4 N and the adapter's share, less what the last layer and the head do at answers alone.

    At all positions the last layer would bring it to 3.98 N, and the head too to 4.04 N.
    """
    n = meters.matmul_parameters(SEVEN_B)
    assert n == 7_110_393_856  # 7,241,732,096 less the embedding table and the norms
    assert 3.7 * n < step_flops_per_token("nothing") <= 3.9 * n
    assert step_flops_per_token("nothing", DORA) <= 3.9 * n
    # The counter sees what is computed again.
    gate_and_up = 2 * SEVEN_B.hidden_size * SEVEN_B.intermediate_size * SEVEN_B.num_layers
    again = step_flops_per_token("mlp") - step_flops_per_token("nothing")
    assert again == pytest.approx(2 * gate_and_up, rel=0.04)
    assert step_flops_per_token("layer") > 5 * n


def saved_bytes(recompute, attention=XLA, adapter=ALL) -> float:
    """Per token and layer, of what the backward pass is given by the forward pass."""
    partition, trainable, base, batch = seven_b(recompute, attention, adapter)
    microbatch = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in batch.items()}

    def residuals(trainable, base, microbatch):
        loss = functools.partial(_loss, partition, base, microbatch)
        return jax.vjp(loss, trainable)[1]

    kept = jax.tree.leaves(jax.eval_shape(residuals, trainable, base, microbatch))
    # Stacked over layers and tokens: not the weights, which are there anyway.
    tokens = ROWS * LENGTH
    layers = SEVEN_B.num_layers - 1
    adapter = {(layers, *leaf.shape[1:]) for leaf in jax.tree.leaves(trainable)}
    stacked = [x for x in kept if x.shape[:1] == (layers,) and x.shape not in adapter]
    assert stacked
    return sum(x.size * x.dtype.itemsize for x in stacked) / tokens / layers


def count_primitives(jaxpr, name) -> int:
    own = sum(equation.primitive.name == name for equation in jaxpr.eqns)
    inner = (count_primitives(x, name) for equation in jaxpr.eqns for x in inner_jaxprs(equation))
    return own + sum(inner)


@pytest.fixture
def cudnn_anywhere(monkeypatch):
    """Programs with cuDNN's kernel can be traced where cuDNN is not."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda _: True)


def gradient_jaxpr(recompute, attention):
    partition, trainable, base, batch = seven_b(recompute, attention)
    microbatch = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in batch.items()}

    def gradient(trainable, base, microbatch):
        return jax.grad(functools.partial(_loss, partition, base, microbatch))(trainable)

    traced = jax.make_jaxpr(gradient)(trainable, base, microbatch)
    return partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))[0]


@pytest.mark.parametrize(("recompute", "runs"), [("nothing", 1), ("mlp", 1), ("layer", 2)])
def test_kernels_do_not_run_again_for_their_log_sum_exp(recompute, runs, cudnn_anywhere):
    """Once in the loop over the layers; the last one's attention, at answer positions, is "xla"."""
    for config in (CUDNN, PACKED):
        jaxpr = gradient_jaxpr(recompute, config)
        assert count_primitives(jaxpr, "dot_product_attention_fwd_wrapper") == runs
        assert count_primitives(jaxpr, "dot_product_attention_bwd_wrapper") == 1
    # Splash has two kernels for gradients: of query, and of key and value.
    assert count_primitives(gradient_jaxpr(recompute, SPLASH), "pallas_call") == runs + 2


@pytest.mark.parametrize("window", [None, 100])
def test_cudnn_is_asked_as_by_jaxs_public_function(window, cudnn_anywhere):
    """The same kernels with the same attributes for the same shapes, forward and backward."""
    query = jax.ShapeDtypeStruct((3, 128, 4, 64), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((3, 128, 2, 64), jnp.bfloat16)
    lengths = jax.ShapeDtypeStruct((3,), jnp.int32)

    def public(query, key, value, lengths, gradient):
        def run(query, key, value):
            return jax.nn.dot_product_attention(
                query,
                key,
                value,
                is_causal=True,
                query_seq_lengths=lengths,
                key_value_seq_lengths=lengths,
                local_window_size=None if window is None else (window - 1, 0),
                implementation="cudnn",
            )

        output, pullback = jax.vjp(run, query, key, value)
        return output, *pullback(gradient)

    def ours(query, key, value, lengths, gradient):
        kept = attention._cudnn_forward(query, key, value, lengths, None, window)
        arrays = (query, key, value, lengths, None, window, *kept, gradient)
        return kept[0], *attention._cudnn_backward(*arrays)

    def kernels(function):
        traced = jax.make_jaxpr(function)(query, key, key, lengths, query)
        jaxpr, _ = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
        return [
            (
                equation.primitive.name,
                equation.params,
                [x.aval for x in equation.invars],
                [x.aval for x in equation.outvars],
            )
            for equation in all_equations(jaxpr)
            if equation.primitive.name.startswith("dot_product_attention")
        ]

    assert len(kernels(public)) == 2
    assert kernels(ours) == kernels(public)


def _loss(partition, base, microbatch, trainable):
    return step.answer_loss(partition.merge(trainable, base), microbatch)


@pytest.mark.parametrize("backend", [XLA, CUDNN, PACKED, SPLASH], ids=lambda c: c.backend)
def test_what_is_kept_for_the_backward_pass(backend, cudnn_anywhere):
    assert 80e3 < saved_bytes("nothing", backend) <= 95e3
    assert saved_bytes("mlp", backend) <= 38e3
    assert saved_bytes("layer", backend) <= 9e3
    # What DoRA keeps of a weight stands for what is made from it.
    assert saved_bytes("nothing", backend, DORA) <= 103e3


@pytest.mark.parametrize("recompute", ["nothing", "mlp", "layer"])
def test_computing_again_changes_no_gradient(recompute, monkeypatch):
    adapter = replace(ADAPTER, dora=recompute == "nothing")
    partition, trainable, base = start(adapter)
    leaner = lora.partition(CONFIG, adapter, jnp.float32, execution=Execution(recompute=recompute))
    batch = Batches(examples(6), batch_config(), epochs=1, seed=None, row_multiple=1)[0]
    microbatch = {name: array[0] for name, array in batch.items()}

    def gradients(partition):
        return jax.jit(jax.grad(functools.partial(_loss, partition, base, microbatch)))(trainable)

    lean = gradients(leaner)
    monkeypatch.setattr(jax, "checkpoint", lambda function, **_: function)
    plain = gradients(partition)
    for ours, theirs in zip(jax.tree.leaves(lean), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_layers_compiled_one_by_one_are_those_of_the_loop():
    partition, trainable, base = start(ADAPTER)
    unrolled = lora.partition(
        CONFIG, ADAPTER, jnp.float32, execution=Execution(attention=XLA, unrolled=True)
    )
    batch = Batches(examples(6), batch_config(), epochs=1, seed=None, row_multiple=1)[0]
    microbatch = {name: array[0] for name, array in batch.items()}

    def run(partition):
        jitted = jax.jit(jax.value_and_grad(functools.partial(_loss, partition, base, microbatch)))
        return jitted(trainable), jitted.lower(trainable).as_text().count("stablehlo.while")

    (found, loops), (expected, more) = run(unrolled), run(partition)
    assert loops == 0 and more == 2
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_every_way_to_recompute_keeps_names_that_exist():
    """A name that no array bears would be ignored in silence."""
    partition, trainable, base = start(replace(ADAPTER, dora=True))
    batch = Batches(examples(6), batch_config(), epochs=1, seed=None, row_multiple=1)[0]
    microbatch = {name: array[0] for name, array in batch.items()}
    text = str(jax.make_jaxpr(functools.partial(_loss, partition, base, microbatch))(trainable))
    for name in set().union(*SAVED_NAMES.values()):
        assert f"name[name={name}]" in text.replace("\n", "").replace(" ", ""), name


def test_an_epoch_is_one_compilation():
    partition, trainable, base = start(ADAPTER)
    optimizer = make_optimizer(OPTIMIZER, 6)
    mesh = parallel.make_mesh(ONE, jax.devices()[:1])
    batches = Batches(examples(), batch_config(), epochs=2, seed=5, row_multiple=1)
    _, placements = step.state_shardings(partition, optimizer, mesh)
    state = step.TrainState(jnp.int32(0), trainable, optimizer.init(trainable))
    state = jax.device_put(state, placements)
    run = step.jit_train_step(partition, optimizer, 0, mesh)
    with jax.set_mesh(mesh):
        for number in range(batches.steps):
            state, _ = run(
                state, base, parallel.put(batches[number], mesh, None, parallel.BATCH_AXES)
            )
    assert run._cache_size() == 1


def test_adapter_gradients_of_a_bfloat16_model_are_summed_in_float32():
    """Over the tokens and over the devices: half the bits would be lost otherwise."""
    partition, trainable, base, batch = seven_b()
    microbatch = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in batch.items()}
    jaxpr = jax.make_jaxpr(
        lambda trainable, base, microbatch: jax.grad(
            functools.partial(_loss, partition, base, microbatch)
        )(trainable)
    )(trainable, base, microbatch)
    shapes = {leaf.shape[1:] for leaf in jax.tree.leaves(trainable)}
    found = [
        equation.outvars[0].aval
        for equation in all_equations(jaxpr.jaxpr)
        if equation.primitive.name == "dot_general" and equation.outvars[0].aval.shape in shapes
    ]
    assert len(found) >= 14
    assert {aval.dtype for aval in found} == {jnp.dtype("float32")}


def all_equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in inner_jaxprs(equation):
            yield from all_equations(inner)


def test_a_step_that_does_not_fit_is_refused():
    program = preflight.StepProgram(2**30, 3 * 2**30, 2 * 2**30, 1.0, [])
    with pytest.raises(ValueError, match=r"needs 3.0 GiB a device, which has 2.0: raise batch"):
        program.check()
    preflight.StepProgram(2**30, 3 * 2**30, None, 1.0, []).check()
    assert "3.00 GiB of 2.0" in str(program)


def test_a_step_that_the_compiler_refuses_is_told_in_a_line(monkeypatch):
    """A TPU's compiler does so when a step is too large; that must not end in a traceback."""

    class Refused:
        def lower(self, *_):
            return self

        def compile(self):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED:\n  Ran out of memory")

    monkeypatch.setattr(step, "jit_train_step", lambda *_: Refused())
    partition, _, _ = start(ADAPTER)
    mesh = parallel.make_mesh(ONE, jax.devices()[:1])
    batch = preflight.batch_shapes(mesh, 1, 8, 64, 16)
    optimizer = make_optimizer(OPTIMIZER, 6)
    with pytest.raises(ValueError, match="EXHAUSTED: Ran out of memory.* raise batch.microbatches"):
        preflight.compile_step(partition, optimizer, 0, mesh, jnp.float32, batch)


def test_collectives_are_read_from_the_program_itself():
    mesh = parallel.make_mesh(parallel.MeshConfig(1, 8, 1), jax.devices()[:8])
    partition, _, base = start(ADAPTER)
    optimizer = make_optimizer(OPTIMIZER, 6)
    batch = preflight.batch_shapes(mesh, 1, 8, 64, 16)
    compiled = preflight.compile_step(partition, optimizer, 0, mesh, jnp.float32, batch)
    program = preflight.examine(compiled, jax.devices()[0])
    kinds = {kind for kind, _ in program.moved}
    assert "all-gather" in kinds  # fsdp: a layer's weights are gathered
    assert program.total > program.arguments > 0
    mesh = parallel.make_mesh(parallel.MeshConfig(8, 1, 1), jax.devices()[:8])
    batch = preflight.batch_shapes(mesh, 1, 8, 64, 16)
    compiled = preflight.compile_step(partition, optimizer, 0, mesh, jnp.float32, batch)
    assert_no_base_weights_move(preflight.examine(compiled, jax.devices()[0]), partition)


def assert_no_base_weights_move(program, partition):
    """In pure data parallelism the adapter's gradients are summed, and that is all."""
    assert {kind for kind, _ in program.moved} <= {"all-reduce"}
    adapter = sum(leaf.size * 4 for leaf in jax.tree.leaves(partition.trainable))
    assert sum(size for _, size in program.moved) <= 1.01 * adapter + 64


@pytest.mark.parametrize("count", [1, 8])
def test_utilisation_is_of_all_devices_together(count, monkeypatch):
    devices = jax.devices()[:count]
    assert meters.mfu(2500.0, 4e9, devices) is None  # no datasheet of this one
    monkeypatch.setattr(meters, "peak_flops", lambda kind: 20e12 if kind == "cpu" else None)
    assert meters.mfu(2500.0, 4e9, devices) == pytest.approx(0.5 / count)


def test_the_pace_is_of_steps_alone():
    """Not of the validation that a resumed run makes up for, nor of a checkpoint between steps."""
    now = [0.0]
    pace = meters.Pace(lambda: now[0])

    def after(seconds, tokens):
        now[0] += seconds
        return pace.step(tokens)

    now[0] += 300  # the validation that was due
    pace.restart()
    assert [after(2, 1000), after(4, 1000)] == [500, 250]
    now[0] += 60  # saved
    pace.restart()
    assert after(2, 500) == 250


def test_peaks_and_forecasts():
    assert meters.peak_flops("NVIDIA H200") == 989e12
    assert meters.peak_flops("TPU v5 lite") == 197e12 and meters.peak_flops("TPU v5") == 459e12
    assert meters.peak_flops("some other card") is None
    assert meters.flops_per_token(SEVEN_B, full=False) == 4 * 7_110_393_856
    # Attention over 2,048 places costs a few per cent of the products with the weights.
    assert 0.02 < 1024 * meters.attention_cost(SEVEN_B) < 0.08
    seconds, basis = preflight.seconds_of_run(
        SEVEN_B, 10**6, jax.devices()[:1], jnp.float32, full=False
    )
    assert seconds > 60 and "matrix product here" in basis
    assert meters.peak_memory_bytes() > 10**7
    assert meters.memory_bytes(jax.devices()[0]) > 10**8
