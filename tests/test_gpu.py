"""Programs of Mistral-7B's shapes, compiled for a GPU that is not there: what they read and run.

Needs `pip install -e '.[cuda]'`, which is gigabytes and no part of the tests' environment; skipped,
and said, without. Attention is left out of the counts.
"""

import importlib.util
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT, command_environment

# From XLA's description of an H100, with the memory and bandwidth of an H200.
TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98
  device_memory_size: 150754820096 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 12 } runtime_version { major: 13 }
device_description_str: "NVIDIA H200"
"""

CODE = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from dataclasses import replace
from jax.experimental import topologies
from radonc_jax import parallel
from radonc_jax.decoding import greedy
from radonc_jax.decoding.scheduler import Scheduler
from radonc_jax.models import lora
from radonc_jax.models.attention import AttentionConfig
from radonc_jax.models.decoder import PROJECTIONS, Cache, Execution, ModelConfig
from radonc_jax.training import preflight
from radonc_jax.training.optimizer import OptimizerConfig, make_optimizer

target, layers, out = sys.argv[1], 4, sys.argv[2]
devices = topologies.get_topology_desc(
    "", "cuda", target_config=target, topology="1x1x1"
).devices
mesh = parallel.make_mesh(parallel.MeshConfig(1, 1, 1), devices)
whole = parallel.replicated(mesh)
shapes = ModelConfig(
    32000, layers, 4096, 32, 8, 128, 14336, 1e-5, 1e4, None, None, False, 4096
)

def step(unrolled):
    config = lora.LoRAConfig(16, 32.0, 0.0, tuple(PROJECTIONS), False, False)
    execution = Execution(AttentionConfig(), unrolled=unrolled)
    partition = lora.partition(shapes, config, jnp.bfloat16, execution=execution)
    optimizer = make_optimizer(OptimizerConfig(2e-4, "constant", 0.0, 0.0, 1.0, 0.9, 0.999), 9)
    batch = preflight.batch_shapes(mesh, 1, 5, 512, 64)
    return preflight.compile_step(partition, optimizer, 0, mesh, jnp.bfloat16, batch).as_text()

def spread(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), tree)

def decoding():
    partition = lora.partition(shapes, None, jnp.bfloat16)
    scheduler = Scheduler(
        partition, mesh, batch=64, max_new_tokens=16, stops=(2,), context=4096
    )
    weights = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=whole), partition.trainable
    )
    state = spread(jax.eval_shape(
        lambda: greedy.empty(shapes, jnp.bfloat16, 64, 256, 16, False)
    ))
    side = jax.ShapeDtypeStruct((layers, 8, 144, 128), jnp.bfloat16, sharding=whole)
    shared = Cache(side, side)
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=whole)
    with jax.set_mesh(mesh):
        decode = scheduler._decode.lower(
            [(weights, partition.frozen)], state, shared, number, number, None
        )
        admit = scheduler._admit.lower(
            weights, partition.frozen, state, shared, number, ints(24, 128), ints(24),
            ints(1, 24), None,
        )
        return decode.compile().as_text(), admit.compile().as_text()

decode, admit = decoding()
made = {"loop": step(False), "unrolled": step(True), "decode": decode, "admit": admit}
open(out, "w").write(json.dumps(made))
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("needs JAX's plugin for CUDA (the extra [cuda]); nothing was compiled for GPUs")
    out = tmp_path_factory.mktemp("gpu") / "programs.json"
    environment = command_environment() | {
        "JAX_PLATFORMS": "cpu,cuda",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    }
    environment.pop("XLA_FLAGS", None)
    done = subprocess.run(
        [sys.executable, "-c", CODE, TARGET, str(out)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(out.read_text())


WEIGHTS = {
    *((14336, 4096), (4096, 14336), (4096, 4096), (1024, 4096)),
    *((6144, 4096), (2048, 4096), (28672, 4096)),  # of several products made one
}


def copies_of_weights(text) -> list[str]:
    """What is as large as a layer's weights and comes from no product, in the program's loops."""
    found = []
    for name, result in re.findall(r"%(\S+) = (\([^=]*?\)|\S+) (?:fusion|copy)\(", text):
        for sizes in re.findall(r"bf16\[([\d,]+)\]", result):
            shape = tuple(map(int, sizes.split(",")))
            if shape[-2:] in WEIGHTS and set(shape[:-2]) <= {1}:
                found.append(f"{name} {shape}")
    return found


def products(text) -> int:
    return text.count('custom_call_target="__cublas$lt$matmul"')


@pytest.mark.slow
@pytest.mark.parametrize("name", ["decode", "admit"])
def test_decoding_reads_weights_and_cache_where_they_lie(programs, name):
    """A copy of a layer's weights is read and written, and then read again by the product."""
    text = programs[name]
    assert products(text) > 10
    assert copies_of_weights(text) == []
    length = r"256" if name == "decode" else "128"
    rows = "64" if name == "decode" else "24"
    layer = rf"= bf16\[(?:1,)?{rows},8,{length},128\]\S* (?:fusion|copy)\("
    assert not re.search(layer, text)


@pytest.mark.slow
def test_no_product_of_a_training_step_runs_twice(programs):
    """Where a loop stacks what is kept, XLA may run gate and up once more for the stack.

    Per layer forward: 7 products and as many pairs of thin ones, q, k and v's first being one,
    and gate's and up's another; what the loop's body holds counts once."""
    wide = r"= \(bf16\[2560,14336\]\S*, s8\[\d+\]\S*\) custom-call"
    forward = [m for m in re.findall(wide + r"[^\n]*", programs["loop"]) if "jvp()/while" in m]
    forward = [m for m in forward if "transpose(jvp" not in m]
    # gate and up, and the thin product that is added to each
    assert len(forward) == 4
    # With few tokens query, key and value are made one product, which copies their weights.
    copies = copies_of_weights(programs["unrolled"])
    assert [name for name in copies if not re.search(r"\((2048|6144), 4096\)", name)] == []
