"""The step of a 7B run, compiled for TPU slices that are not there."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT, command_environment
from test_engine import ALL, assert_no_base_weights_move
from test_parallel import SEVEN_B

from radonc_jax import parallel
from radonc_jax.models import lora
from radonc_jax.models.attention import AttentionConfig
from radonc_jax.models.decoder import Execution
from radonc_jax.training import preflight
from radonc_jax.training.optimizer import OptimizerConfig, make_optimizer

OPTIMIZER = OptimizerConfig(2e-4, "cosine", 0.03, 0.0, 1.0, 0.9, 0.999)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "mesh", "gigabytes"),
    [
        ("v5e:4x4", (1, 16, 1), 16),  # the bfloat16 base must be spread: a chip has 16 GB
        ("v5p:2x2x1", (4, 1, 1), 95),
        ("v6e:2x4", (8, 1, 1), 32),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_mistral_7b_step_fits_tpu_slices(topology, mesh, gigabytes):
    """With its placements and the TPU's own attention kernel, a row of 2,048 tokens a chip."""
    pytest.importorskip("libtpu", reason="libtpu compiles for TPUs; it is in the extra [test]")
    devices = preflight.topology_devices(topology)
    mesh = parallel.make_mesh(parallel.MeshConfig(*mesh), devices)
    partition = lora.partition(
        SEVEN_B, ALL, jnp.bfloat16, execution=Execution(AttentionConfig("splash"))
    )
    batch = preflight.batch_shapes(mesh, 1, mesh.size, 2048, 256)
    optimizer = make_optimizer(OPTIMIZER, 100)
    compiled = preflight.compile_step(partition, optimizer, 0, mesh, jnp.bfloat16, batch)
    program = preflight.examine(compiled, devices[0])
    assert program.limit == gigabytes * 2**30
    weights = 2 * sum(leaf.size for leaf in jax.tree.leaves(partition.frozen))
    parts = mesh.shape["fsdp"]
    assert weights / parts < program.arguments < 1.1 * weights / parts + 2**29
    # The compiler keeps the last gigabyte of a chip to itself.
    assert program.arguments + 2e9 < program.total < program.limit - 2**30
    program.check()
    assert "tpu_custom_call" in compiled.as_text()
    if parts == 1:
        assert_no_base_weights_move(program, partition)
    else:
        assert "all-gather" in {kind for kind, _ in program.moved}


def compile_only(*arguments, code="from radonc_jax import command, train; command.run(train.main)"):
    return subprocess.run(
        [sys.executable, "-c", code, "--config=configs/tiny_icd.py", *arguments],
        cwd=ROOT,
        env=command_environment(),
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.mark.slow
def test_the_command_prints_the_table(workspace):
    pytest.importorskip("libtpu", reason="libtpu compiles for TPUs; it is in the extra [test]")
    model = f"--config.model={workspace.model}"
    result = compile_only(model, "--compile_only", "--topology=v5e:2x2")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "v5e:2x2: 4 TPU v5 lite as data 4 x fsdp 1 x tensor 1, attention: xla" in result.stdout
    assert "memory per device: " in result.stdout and " of 16.0 (" in result.stdout
    assert "all-reduce: " in result.stdout
    result = compile_only(model, "--compile_only", "--topology=v9z:1")
    assert result.returncode == 1
    assert "cannot compile for the TPU topology 'v9z:1'" in result.stderr.splitlines()[-1]


def test_the_flags_go_together(workspace):
    for flag in ("--compile_only", "--topology=v5e:2x2"):
        result = compile_only(f"--config.model={workspace.model}", flag)
        assert result.returncode == 1
        assert "--compile_only and --topology=NAME go together" in result.stderr
