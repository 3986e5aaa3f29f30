"""The step of a 7B run, compiled for TPU slices that are not there."""

import os
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT, command_environment
from test_engine import ALL, assert_no_base_weights_move
from test_parallel import SEVEN_B

from radonc_jax import parallel
from radonc_jax.data import batches, cohort
from radonc_jax.data.batches import BatchConfig, Batches
from radonc_jax.models import huggingface, lora
from radonc_jax.models.attention import AttentionConfig, choose_backend
from radonc_jax.models.decoder import Execution
from radonc_jax.tasks import select
from radonc_jax.training import meters, preflight
from radonc_jax.training.optimizer import OptimizerConfig, make_optimizer

OPTIMIZER = OptimizerConfig(2e-4, "cosine", 0.03, 0.0, 1.0, 0.9, 0.999)


def need_libtpu():
    """Skips without libtpu; where the extra [test] has been installed, that is a failure."""
    try:
        import libtpu  # noqa: F401
    except ImportError:
        has_one = sys.platform == "linux" and platform.machine() == "x86_64"
        if os.environ.get("CI") and has_one:
            pytest.fail("libtpu is missing, though the extra [test] has it")
        pytest.skip("libtpu compiles for TPUs; it is in the extra [test]")


def test_a_missing_libtpu_fails_in_ci(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    # A skip that is not expected would skip this test.
    either = (pytest.skip.Exception, pytest.fail.Exception)
    for value, expected in (("", pytest.skip.Exception), ("true", pytest.fail.Exception)):
        monkeypatch.setenv("CI", value)
        with pytest.raises(either) as found:
            need_libtpu()
        assert found.type is expected


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
    need_libtpu()
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
    need_libtpu()
    model = f"--config.model={workspace.model}"
    result = compile_only(model, "--compile_only", "--topology=v5e:2x2")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "v5e:2x2: 4 TPU v5 lite as data 4 x fsdp 1 x tensor 1, attention: xla" in result.stdout
    assert "splash attention wants heads of a multiple of 128" in result.stdout
    assert "a full row for each example, at most" in result.stdout
    assert "memory per device: " in result.stdout and " of 16.0 (" in result.stdout
    assert "all-reduce: " in result.stdout
    result = compile_only(model, "--compile_only", "--topology=v9z:1")
    assert result.returncode == 1
    assert "cannot compile for the TPU topology 'v9z:1'" in result.stderr.splitlines()[-1]


def test_rows_are_those_that_training_would_lay(workspace, tmp_path):
    architecture = huggingface.read_config(workspace.model)
    config = BatchConfig(64, 2, 512, True, "fail")

    def rows(cohort, model, shards):
        return preflight.rows_to_compile("icd", str(cohort), model, config, 7, architecture, shards)

    found = rows(workspace.cohort, workspace.model, 4)
    tokenizer = huggingface.load_tokenizer(workspace.model)
    records = cohort.load_records(workspace.cohort, "train")
    examples, _ = batches.task_examples(records, select("icd"), tokenizer, config)
    made = Batches(
        examples,
        config,
        epochs=1,
        seed=7,
        row_multiple=4,
        granule=128,
        attention_cost=meters.attention_cost(architecture),
    )
    shape = made[0]["tokens"].shape
    assert found[:3] == (*shape[1:], made.answer_capacity) and shape[0] == 2
    assert found[3] == f"batches of {workspace.cohort}"
    # Examples are shorter than rows: fewer rows than examples, and several on each device.
    assert 4 < found[0] < 32

    # Of what is not at hand, the most that it could be: 64 examples in 2 x 32 rows.
    (tmp_path / "config.json").write_bytes((workspace.model / "config.json").read_bytes())
    assert rows(workspace.cohort, tmp_path, 4) == (
        *(32, 512, 64),
        "without the model's tokenizer, a full row for each example, at most",
    )
    most = rows(tmp_path / "none", workspace.model, 3)
    assert most[:3] == (33, 512, 64) and "without a cohort" in most[3]


def test_rows_that_splash_cannot_take_are_told_before_compiling():
    facts = dict(platform="tpu", dtype=jnp.bfloat16, num_heads=32, num_kv_heads=8, head_dim=128)
    facts |= dict(proven=False)
    assert choose_backend("auto", row_lengths=[2048], **facts)[0] == "splash"
    backend, why = choose_backend("auto", row_lengths=[2000], **facts)
    assert backend == "xla" and "rows of a multiple of 128, not of [2000]" in why
    with pytest.raises(ValueError, match="choose such a batch.sequence_length"):
        choose_backend("splash", row_lengths=[2000], **facts)


def test_the_flags_go_together(workspace):
    for flag in ("--compile_only", "--topology=v5e:2x2"):
        result = compile_only(f"--config.model={workspace.model}", flag)
        assert result.returncode == 1
        assert "--compile_only and --topology=NAME go together" in result.stderr
