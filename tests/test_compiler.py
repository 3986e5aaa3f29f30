"""What XLA is told, and programs that are compiled before they are called."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_parallel import SEVEN_B

from radonc_jax import compiler, loading, parallel
from radonc_jax.data.batches import BatchConfig
from radonc_jax.models import attention, lora
from radonc_jax.models.decoder import Execution, ModelConfig
from radonc_jax.training import meters, preflight, step
from radonc_jax.training.optimizer import OptimizerConfig, make_optimizer

SMALL = ModelConfig(300, 3, 64, 4, 2, 16, 128, 1e-5, 1e4, None, None, False, 1024)
PLAIN = lora.LoRAConfig(16, 32.0, 0.0, tuple(lora.PROJECTIONS), False, False)


def device(platform):
    return SimpleNamespace(platform=platform)


def test_this_xla_knows_every_option():
    for platform in ("gpu", "cuda"):
        for work, wanted in compiler.OPTIONS["gpu"].items():
            assert compiler.options(device(platform), work) == wanted
    assert compiler.options(device("tpu"), "training") is None
    assert compiler.options(device("cpu"), "training") is None


def test_an_option_that_this_xla_does_not_know_is_left_out(monkeypatch):
    kept = {"xla_gpu_enable_triton_gemm": False}
    told = {"gpu": {"training": kept | {"xla_gpu_was_removed_in_this_version": True}}}
    monkeypatch.setattr(compiler, "OPTIONS", told)
    assert compiler.options(device("gpu"), "training") == kept
    told["gpu"]["training"] = {"xla_gpu_was_removed_in_this_version": True}
    assert compiler.options(device("gpu"), "training") is None


@pytest.mark.parametrize(
    ("unrolled", "work"), [(True, "training"), (False, "training by a loop")], ids=str
)
def test_a_step_is_compiled_as_its_layers_are(unrolled, work, monkeypatch):
    """What a GPU is told of either, and not only that it is told something."""
    asked = []
    monkeypatch.setattr(compiler, "options", lambda _, work: asked.append(work))
    partition = lora.partition(SMALL, PLAIN, jnp.float32, execution=Execution(unrolled=unrolled))
    mesh = parallel.make_mesh(parallel.MeshConfig(1, 1, 1), jax.devices()[:1])
    optimizer = make_optimizer(OptimizerConfig(2e-4, "constant", 0.0, 0.0, 1.0, 0.9, 0.999), 9)
    given = []
    monkeypatch.setattr(jax, "jit", lambda _, **options: given.append(options))
    step.jit_train_step(partition, optimizer, 0, mesh)
    step.jit_evaluation_step(partition, mesh)
    assert asked == [work] * 2 and all("compiler_options" in options for options in given)
    told = compiler.OPTIONS["gpu"]
    assert told["training by a loop"]["xla_gpu_enable_dynamic_slice_fusion"] is False
    assert "xla_gpu_enable_dynamic_slice_fusion" not in told["training"]


@pytest.fixture
def threads():
    with ThreadPoolExecutor(2) as pool:
        yield pool


def test_what_was_expected_is_not_compiled_again(threads):
    mesh = parallel.make_mesh(parallel.MeshConfig(2, 1, 1), jax.devices()[:2])
    jitted = jax.jit(lambda x, y: (x + y, None), donate_argnums=0)
    ahead = compiler.Ahead(jitted, threads)
    with jax.set_mesh(mesh):
        x, y = (parallel.put(np.ones(4, np.float32), mesh, "data") for _ in range(2))
        ahead.expect(x, y)
        ahead.expect(x, y)
        total, none = ahead(x, y)
    assert none is None and total.tolist() == [2, 2, 2, 2]
    assert x.is_deleted()  # donated, as by the function itself
    assert len(ahead._compiled) == 1 and jitted._cache_size() == 0
    with jax.set_mesh(mesh):  # other places or shapes are another program
        x = parallel.put(np.ones(4, np.float32), mesh)
        assert ahead(x, y)[0].tolist() == [2, 2, 2, 2]
    assert jitted._cache_size() == 1


def test_what_cannot_be_compiled_fails_where_it_is_called(threads):
    ahead = compiler.Ahead(jax.jit(lambda x: x @ jnp.ones(3)), threads)
    with jax.set_mesh(parallel.make_mesh(parallel.MeshConfig(1, 1, 1), jax.devices()[:1])):
        ahead.expect(np.ones(2, np.float32))
        with pytest.raises(TypeError, match="contracting dimensions"):
            ahead(np.ones(2, np.float32))


def test_what_failed_ahead_is_tried_again(threads):
    jitted, failures = jax.jit(lambda x: x + 1), [1]

    def lower(*arguments):
        if failures:
            raise RuntimeError(f"out of memory, {failures.pop()}")
        return jitted.lower(*arguments)

    def function(x):
        return jitted(x)

    function.lower = lower
    ahead = compiler.Ahead(function, threads)
    with jax.set_mesh(parallel.make_mesh(parallel.MeshConfig(1, 1, 1), jax.devices()[:1])):
        ahead.expect(np.float32(1))
        assert ahead(np.float32(1)) == 2 and not ahead._compiled


def test_what_is_not_wanted_any_more_is_not_compiled():
    begun, go_on, compiled = threading.Event(), threading.Event(), []

    def lower(x):
        begun.set()
        assert go_on.wait(60)
        compiled.append(x)
        return SimpleNamespace(compile=lambda: lambda x: x)

    with ThreadPoolExecutor(1) as pool:
        ahead = compiler.Ahead(SimpleNamespace(lower=lower), pool)
        with jax.set_mesh(parallel.make_mesh(parallel.MeshConfig(1, 1, 1), jax.devices()[:1])):
            for width in (1, 2, 3):
                ahead.expect(np.ones(width))
            assert begun.wait(60)
            ahead.cancel()
            go_on.set()
            assert ahead(np.ones(1)).tolist() == [1]
    assert len(compiled) == 1 and len(ahead._compiled) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "axes", [(1, 1, 1), pytest.param((2, 1, 2), marks=pytest.mark.long)], ids=str
)
def test_answers_do_not_depend_on_when_their_programs_are_compiled(axes, threads, monkeypatch):
    mesh = parallel.make_mesh(parallel.MeshConfig(*axes), jax.devices()[: int(np.prod(axes))])
    partition = lora.partition(SMALL, None, jnp.float32)

    def draw():
        leaves, structure = jax.tree.flatten(partition.trainable)
        keys = jax.random.split(jax.random.key(0), len(leaves))
        drawn = (0.1 * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True))
        return structure.unflatten(drawn)

    weights = jax.jit(draw, out_shardings=parallel.shardings(partition.trainable, mesh))()
    rng = np.random.default_rng(0)
    beginning = rng.integers(3, 300, 30).tolist()
    prompts = [beginning + rng.integers(3, 300, n).tolist() for n in rng.integers(5, 200, 40)]
    prompts.append(rng.integers(3, 300, 20).tolist())
    labels = [[5, 2], [7, 8, 2]]

    def run():
        scheduler = loading.make_scheduler(partition, mesh, SMALL, (2, 5, 9), 8, 12)
        given = weights, partition.frozen, prompts
        return (
            scheduler,
            scheduler(*given, prefix=beginning),
            dict(scheduler.score(*given, labels, prefix=beginning)),
        )

    _, *expected = run()
    monkeypatch.setattr(compiler, "workers", lambda _: threads)
    scheduler, *found = run()
    assert found == expected
    for ahead in (scheduler._admit, scheduler._decode, scheduler._score):
        assert ahead._compiled and ahead._function._cache_size() == 0


def test_cpus_and_runs_of_several_processes_compile_in_their_turn(monkeypatch):
    assert compiler.workers(jax.devices()[0]) is None
    assert compiler.workers(device("tpu")) is None
    compiler.workers(device("gpu")).shutdown()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert compiler.workers(device("gpu")) is None


@pytest.mark.parametrize(
    ("other", "unrolled"),
    [
        ({}, True),  # an H200, by JAX's own share of its memory
        ({"gigabytes": 73}, False),  # an H100: its loop needs 69
        ({"gigabytes": 73, "axes": (4, 1, 1)}, True),
        ({"gigabytes": 200, "axes": (1, 4, 1)}, False),
        ({"gigabytes": 200, "axes": (1, 1, 4)}, False),
        ({"gigabytes": None}, False),
        ({"backend": "cudnn"}, False),
        ({"backend": "xla"}, False),
        ({"recompute": "mlp"}, False),
        ({"stored": jnp.float32}, False),
        ({"quantized": "int8"}, False),
        ({"adapter": None}, False),
        ({"adapter": replace(PLAIN, dora=True)}, False),
        ({"adapter": replace(PLAIN, dropout=0.1)}, False),
        ({"adapter": replace(PLAIN, rank=512)}, False),  # 21 GB of its own
    ],
    ids=str,
)
def test_layers_are_compiled_one_by_one_where_it_was_measured_and_fits(
    other, unrolled, monkeypatch
):
    """A step of 16,064 tokens: 88 GB with weights on an H200, by a loop 69."""
    facts = dict(
        gigabytes=105,
        axes=(1, 1, 1),
        backend="cudnn_packed",
        recompute="nothing",
        stored=jnp.bfloat16,
        adapter=PLAIN,
        quantized=None,
    )
    facts |= other
    limit = None if facts["gigabytes"] is None else facts["gigabytes"] * 10**9
    monkeypatch.setattr(meters, "memory_bytes", lambda _: limit)
    monkeypatch.setattr(attention, "choose_backend", lambda *_, **__: (facts["backend"], "passed"))
    mesh = parallel.make_mesh(
        parallel.MeshConfig(*facts["axes"]), jax.devices()[: int(np.prod(facts["axes"]))]
    )
    config = BatchConfig(64, 1, 2048, True, "fail")
    batches = SimpleNamespace(rows=8, row_length=2008, config=config, segments=8, longest=444)
    execution, why = preflight.choose_execution(
        "auto",
        facts["recompute"],
        SEVEN_B,
        jnp.bfloat16,
        facts["stored"],
        facts["adapter"],
        facts["quantized"],
        [batches],
        mesh,
    )
    assert execution.unrolled == unrolled and why == "passed"
    assert execution.attention == attention.AttentionConfig(facts["backend"], 8, 448)


def test_rows_are_long_where_attention_looks_at_nothing_else_of_them():
    cost = meters.attention_cost(SEVEN_B)
    for platform, wanted, dtype, expected in [
        ("gpu", "auto", jnp.bfloat16, 0.0),
        ("gpu", "cudnn", jnp.float16, 0.0),
        ("gpu", "xla", jnp.bfloat16, cost),
        ("gpu", "auto", jnp.float32, cost),
        ("cpu", "auto", jnp.bfloat16, cost),
        ("tpu", "auto", jnp.bfloat16, cost),
    ]:
        layout = preflight.row_layout(SEVEN_B, platform, 2, wanted, dtype)
        assert layout["attention_cost"] == expected and layout["row_multiple"] == 2


def test_kept_bytes_and_parameters_are_those_of_mistral_7b():
    assert meters.parameters(SEVEN_B) == 7_241_732_096
    assert meters.kept_bytes(SEVEN_B, jnp.bfloat16) == 32 * 86_144
