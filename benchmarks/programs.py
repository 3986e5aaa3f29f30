"""Milliseconds of single programs on a GPU, in the forms among which `radonc_jax.compiler` chooses.

    python benchmarks/programs.py                Mistral-7B's shapes, for a GPU of 141 GB
    python benchmarks/programs.py --size=tiny    whether it runs, on any machine

Random bfloat16 weights are drawn on the device. A training step of 64 examples of clinical lengths
(rank 16 on all projections), with layers one by one or as a loop, with packed or padded segments;
a decode step of 256 slots and a prefill of 8,192 tokens, with and without XLA's own options. With
them, what the device reaches with one large product and with one large copy at that moment, and
the kernels that take most of the time. All forms are compiled together, in threads. Writes JSON.
"""

import functools
import json
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from radonc_jax import compiler, parallel, tracking
from radonc_jax.data.batches import BatchConfig, Batches, Example
from radonc_jax.decoding import greedy, scheduler
from radonc_jax.models import attention, lora
from radonc_jax.models.decoder import PROJECTIONS, Cache, Execution, ModelConfig
from radonc_jax.training import meters, step
from radonc_jax.training.optimizer import OptimizerConfig, make_optimizer

_SIZE = flags.DEFINE_enum("size", "7b", ["7b", "tiny"], "Of the model.")
_REPEATS = flags.DEFINE_integer("repeats", 6, "Timed runs of each program.", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", "benchmarks/results/programs.json", "JSON to write.")

ARCHITECTURES = {
    "7b": ModelConfig(32000, 32, 4096, 32, 8, 128, 14336, 1e-5, 1e4, None, None, False, 4096),
    "tiny": ModelConfig(500, 3, 64, 4, 2, 16, 128, 1e-5, 1e4, None, None, False, 4096),
}
EXAMPLES = {"7b": 64, "tiny": 8}  # of a training step
SLOTS, LENGTH, BEGUN, NEW = 256, 256, 130, 64  # of a cache, of it shared, tokens of an answer
ROWS, WIDTH = 64, 128  # of a prefill
TOP = 30  # kernels that are told


def main(argv):
    del argv
    mesh = parallel.make_mesh(parallel.MeshConfig(1, 1, 1), jax.devices()[:1])
    found = {"size": _SIZE.value, "environment": tracking.environment(), **ceilings()}
    path = Path(_OUTPUT.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, measured in (("training", training(mesh)), ("decoding", decoding(mesh))):
        found[name] = {}
        for form, figures in measured:
            print(
                form, json.dumps({k: v for k, v in figures.items() if k != "kernels"}), flush=True
            )
            found[name][form] = figures
            tracking.write_json(path, found)  # so far: nothing is lost if it is cut off


def dtype():
    """A CPU has no products of bfloat16 that are summed in float32."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def seconds_of(run, repeats=None) -> list[float]:
    """Of each run after a first one; `run` waits for its end."""
    run()
    taken = []
    for _ in range(repeats or _REPEATS.value):
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return taken


def ceilings() -> dict:
    """TFLOP/s of one product of random numbers, and TB/s of adding one in place."""
    size, length = (8192, 2**29) if _SIZE.value == "7b" else (256, 2**20)
    x, y = (jax.random.normal(jax.random.key(n), (size, size), dtype()) for n in range(2))
    multiply, add = jax.jit(jnp.dot), jax.jit(lambda x: x + 1, donate_argnums=0)
    product = statistics.median(seconds_of(lambda: multiply(x, y).block_until_ready(), 8))
    stream = jnp.zeros(length, jnp.float32)

    def one():
        nonlocal stream
        stream = add(stream).block_until_ready()

    copy = statistics.median(seconds_of(one, 8))
    return {
        "product_tflops": 2 * size**3 / product / 1e12,
        "copy_tb_per_second": 2 * stream.nbytes / copy / 1e12,
    }


def draw(shapes, mesh, kind):
    def made():
        leaves, structure = jax.tree.flatten(shapes)
        keys = jax.random.split(jax.random.key(0), len(leaves))
        pairs = zip(keys, leaves, strict=True)
        return structure.unflatten([0.02 * jax.random.normal(k, x.shape, kind) for k, x in pairs])

    return jax.jit(made, out_shardings=parallel.shardings(shapes, mesh))()


def clinical_examples(count: int, vocabulary: int) -> list[Example]:
    """Prompts of 100 to 400 random tokens, answers of 5 to 100."""
    rng = np.random.default_rng(0)
    prompts = np.clip(rng.lognormal(np.log(215), 0.33, count), 100, 400).astype(int)
    answers = np.clip(rng.lognormal(np.log(21), 0.75, count), 5, 100).astype(int)
    return [
        Example(
            f"case{number}",
            (1, *rng.integers(3, vocabulary, prompt - 1).tolist()),
            (*rng.integers(3, vocabulary, answer - 1).tolist(), 2),
        )
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]


def compiled(programs: dict, mesh):
    """Compiles all at once: {form: function that lowers it} -> {form: (program, seconds)}."""

    def one(lower):
        with jax.set_mesh(mesh):
            lowered = lower()
        began = time.perf_counter()
        return lowered.compile(), time.perf_counter() - began

    with ThreadPoolExecutor(8) as pool:
        running = {form: pool.submit(one, lower) for form, lower in programs.items()}
        return {form: future.result() for form, future in running.items()}


def training(mesh):
    architecture = ARCHITECTURES[_SIZE.value]
    data = Batches(
        clinical_examples(3 * EXAMPLES[_SIZE.value], architecture.vocab_size),
        BatchConfig(EXAMPLES[_SIZE.value], 1, 2048, True, "fail"),
        epochs=1,
        seed=0,
        row_multiple=1,
    )
    batch = parallel.put(data[0], mesh, None, parallel.BATCH_AXES)
    config = lora.LoRAConfig(16, 32.0, 0.0, tuple(PROJECTIONS), False, False)
    optimizer = make_optimizer(OptimizerConfig(2e-4, "constant", 0.0, 0.0, 1.0, 0.9, 0.999), 100)
    backends = ("cudnn_packed", "cudnn") if jax.default_backend() == "gpu" else ("xla", "xla")
    forms = {
        "packed, layers one by one": (backends[0], True, "training"),
        "packed, a loop": (backends[0], False, "training by a loop"),
        "packed, a loop, slices spared": (backends[0], False, "training"),
        "padded, layers one by one": (backends[1], True, "training"),
    }
    partitions = {}
    for form, (backend, unrolled, _) in forms.items():
        laid_out = attention.AttentionConfig(backend, data.segments, -(-data.longest // 64) * 64)
        execution = Execution(laid_out, unrolled=unrolled)
        partitions[form] = lora.partition(architecture, config, dtype(), execution=execution)
    partition = next(iter(partitions.values()))
    base = draw(partition.frozen, mesh, dtype())
    adapter = draw(partition.trainable, mesh, jnp.float32)
    placements = step.state_shardings(partition, optimizer, mesh)[1]

    @functools.partial(jax.jit, out_shardings=placements)
    def state_of(adapter):
        copied = jax.tree.map(lambda x: x + 0, adapter)
        return step.TrainState(jnp.int32(0), copied, optimizer.init(copied))

    def lower(form):
        run = jax.jit(
            functools.partial(step.train_step, partitions[form], optimizer, 0),
            donate_argnums=0,
            out_shardings=(placements, parallel.replicated(mesh)),
            compiler_options=compiler.options(jax.devices()[0], forms[form][2]),
        )
        return run.lower(state_of(adapter), base, batch)

    programs = compiled({form: functools.partial(lower, form) for form in forms}, mesh)
    useful = data.useful_tokens(0)
    for form, (program, seconds) in programs.items():
        state = state_of(adapter)

        def run(program=program):
            nonlocal state
            state, metrics = program(state, base, batch)
            return float(metrics["loss"])

        taken = seconds_of(run)
        rate = useful / statistics.median(taken)
        per_token = meters.flops_per_token(architecture, full=False)
        yield (
            form,
            {
                "milliseconds": [1e3 * s for s in taken],
                "useful_tokens_per_second": rate,
                "mfu": meters.mfu(rate, per_token, list(mesh.devices.flat)),
                "rows": [data.rows, data.row_length, data.fill],
                "loss": run(),
                "compile_seconds": seconds,
                "temporary_gb": program.memory_analysis().temp_size_in_bytes / 1e9,
                "kernels": kernels(run),
            },
        )


def decoding(mesh):
    architecture = ARCHITECTURES[_SIZE.value]
    partition = lora.partition(architecture, None, dtype())
    weights = draw(partition.trainable, mesh, dtype())
    made = scheduler.Scheduler(
        partition, mesh, batch=SLOTS, max_new_tokens=NEW, stops=(2,), context=4096
    )
    plain = jax.default_backend() == "cpu"
    by_layer = made._by_layer
    shape = (architecture.num_layers, architecture.num_kv_heads, 144, architecture.head_dim)
    keys = (0.1 * jax.random.normal(jax.random.key(n), shape, dtype()) for n in range(2))
    shared = Cache(*keys)
    whole, count = parallel.replicated(mesh), np.int32(SLOTS)

    @functools.partial(jax.jit, static_argnums=0, out_shardings=whole)
    def slots(live):
        state = greedy.empty(architecture, dtype(), SLOTS, LENGTH, NEW, by_layer)
        if not live:
            return state
        ints = functools.partial(jnp.full, SLOTS, dtype=jnp.int32)
        rows = replace(
            state.rows, done=jnp.zeros(SLOTS, bool), begun=ints(BEGUN), position=ints(250)
        )
        return replace(state, rows=rows)

    rng = np.random.default_rng(0)
    tokens = rng.integers(3, architecture.vocab_size, (ROWS, WIDTH)).astype(np.int32)
    lengths = np.full(ROWS, WIDTH - 8, np.int32)
    models, everywhere = made._weights(weights, partition.frozen), made._layers(shared)

    def place(number):
        return np.arange(number * ROWS, (number + 1) * ROWS, dtype=np.int32)[None]

    def prefill(program, state, number):
        given = weights, partition.frozen, state, shared, np.int32(BEGUN), tokens, lengths
        return program(*given, place(number), None)

    def answer(program, state):
        return program(models, state, everywhere, count, count, None)

    # The functions without the options that they come with.
    bare = {
        name: jax.jit(getattr(made, name)._function.__wrapped__, donate_argnums=donated)
        for name, donated in (("_decode", 1), ("_admit", 2))
    }
    chosen = {"_decode": made._decode._function, "_admit": made._admit._function}
    lowering = {}
    for form, functions in {"": chosen, ", XLA's own options": bare}.items():
        lowering["decode step" + form] = functools.partial(
            answer, functions["_decode"].lower, slots(True)
        )
        lowering["prefill" + form] = functools.partial(
            prefill, functions["_admit"].lower, slots(False), 0
        )
    if plain:
        lowering = {form: lower for form, lower in lowering.items() if "own" not in form}
    for form, (program, seconds) in compiled(lowering, mesh).items():
        if form.startswith("decode"):

            def run(program=program):
                state, told = answer(program, slots(True))
                return int(told[1])

            steps = run()
        else:

            def run(program=program):
                state = slots(False)
                for number in range(SLOTS // ROWS):
                    state = prefill(program, state, number)
                jax.block_until_ready(state)

            steps = SLOTS // ROWS
        taken = [1e3 * s / steps for s in seconds_of(run)]
        figures = {"milliseconds": taken, "runs": steps, "compile_seconds": seconds}
        yield form, figures | {"kernels": kernels(run)}


def kernels(run) -> list:
    """The kernels of one run that take longest, [name, milliseconds, times]; none on a CPU."""
    if jax.default_backend() != "gpu":
        return []
    total, times = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (trace,) = Path(folder).rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
            for line in plane.lines:
                if "GPU" in plane.name and line.name.startswith("Stream"):
                    for event in line.events:
                        total[event.name] = total.get(event.name, 0) + event.duration_ns
                        times[event.name] = times.get(event.name, 0) + 1
    longest = sorted(total, key=total.get, reverse=True)[:TOP]
    return [[name[:110], total[name] / 1e6, times[name]] for name in longest]


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    app.run(main)
