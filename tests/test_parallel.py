"""Placement: one rule for every array, and meshes that fit."""

import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ROOT, command_environment

from radonc_jax import parallel
from radonc_jax.models import lora
from radonc_jax.models.decoder import ModelConfig
from radonc_jax.parallel import MeshConfig, make_mesh, partition_spec
from radonc_jax.training import preflight

SEVEN_B = ModelConfig(32000, 32, 4096, 32, 8, 128, 14336, 1e-5, 1e4, None, 4096, False, 32768)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("adapter", ["lora", "dora with dropout", "full"])
def test_every_array_of_base_adapter_and_optimiser_has_one_rule(adapter, tied):
    config = ModelConfig(**(vars(SEVEN_B) | {"tie_word_embeddings": tied}))
    settings = {
        "lora": lora.LoRAConfig(16, 32.0, 0.0, tuple(lora.PROJECTIONS), False, False),
        "dora with dropout": lora.LoRAConfig(16, 32.0, 0.1, tuple(lora.PROJECTIONS), False, True),
        "full": None,
    }[adapter]
    partition = lora.partition(config, settings, jnp.bfloat16)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(1)))
    state = jax.eval_shape(optimizer.init, partition.trainable)
    mesh = make_mesh(MeshConfig(2, 2, 2), jax.devices()[:8])
    for tree, of_optimizer in (
        (partition.trainable, False),
        (partition.frozen, False),
        (partition.keys, False),
        (state, True),
    ):
        placed = parallel.shardings(tree, mesh, optimizer=of_optimizer)
        assert jax.tree.structure(placed) == jax.tree.structure(tree)
    # Moments lie where their parameters lie.
    flat = {
        parallel.path_name(p): s
        for p, s in jax.tree_util.tree_leaves_with_path(
            parallel.shardings(partition.trainable, mesh)
        )
    }
    moments = jax.tree_util.tree_leaves_with_path(parallel.shardings(state, mesh, optimizer=True))
    found = 0
    for path, sharding in moments:
        name = parallel.path_name(path)
        for kind in ("/mu/", "/nu/"):
            if kind in name:
                assert sharding == flat[name.split(kind)[1]]
                found += 1
    assert found == 2 * len(flat)


def test_large_arrays_are_split_over_fsdp_and_tensor():
    mesh = make_mesh(MeshConfig(1, 4, 2), jax.devices()[:8])
    partition = lora.partition(SEVEN_B, None, jnp.bfloat16)
    for path, sharding in jax.tree_util.tree_leaves_with_path(
        parallel.shardings(partition.trainable, mesh)
    ):
        if "norm" not in parallel.path_name(path):
            assert set(filter(None, sharding.spec)) == {"fsdp", "tensor"}


@pytest.mark.parametrize("adapter", ["dora", "full"])
def test_hidden_lies_on_fsdp_and_heads_mlp_and_vocabulary_on_tensor(adapter):
    """All sizes differ here, so a dimension's size tells what it is, apart from the table."""
    config = ModelConfig(**(vars(SEVEN_B) | {"head_dim": 96}))
    axes = {4096: "fsdp", 32 * 96: "tensor", 8 * 96: "tensor", 14336: "tensor", 32000: "tensor"}
    lora_config = lora.LoRAConfig(16, 32.0, 0.0, tuple(lora.PROJECTIONS), False, True)
    partition = lora.partition(config, lora_config if adapter == "dora" else None, jnp.bfloat16)
    mesh = make_mesh(MeshConfig(1, 4, 2), jax.devices()[:8])
    for tree in (partition.trainable, partition.frozen):
        placed = jax.tree.leaves(parallel.shardings(tree, mesh))
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(tree), placed, strict=True
        ):
            name = parallel.path_name(path)
            small = name.endswith("norm/scale")
            expected = [None if small else axes.get(size) for size in leaf.shape]
            assert list(sharding.spec) == expected, name


def test_rows_of_a_batch_are_spread_over_data_and_fsdp():
    mesh = make_mesh(MeshConfig(2, 2, 2), jax.devices()[:8])
    rows = np.arange(2 * 8 * 3).reshape(2, 8, 3)  # microbatches, rows, tokens
    placed = parallel.put({"tokens": rows}, mesh, None, parallel.BATCH_AXES)["tokens"]
    np.testing.assert_array_equal(placed, rows)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 2, 3)}
    assert len({shard.index[1].start for shard in placed.addressable_shards}) == 4


@pytest.mark.parametrize(
    "name",
    ["layers/self_attn/z_proj/kernel", "layers/mlp/up_proj/kernels", "encoder/norm/scale"],
)
def test_a_path_without_a_rule_is_an_error(name):
    with pytest.raises(ValueError, match="0 placement rules"):
        partition_spec(name)


def test_a_path_with_two_rules_is_an_error(monkeypatch):
    rules = (*parallel.PARAMETER_AXES, (r"norm/.*", (None,)))
    monkeypatch.setattr(parallel, "PARAMETER_AXES", rules)
    with pytest.raises(ValueError, match="2 placement rules"):
        partition_spec("norm/scale")


def test_an_indivisible_dimension_is_named():
    mesh = make_mesh(MeshConfig(1, 1, 8), jax.devices()[:8])
    config = ModelConfig(**(vars(SEVEN_B) | {"vocab_size": 32001}))
    with pytest.raises(ValueError, match="embed_tokens/embedding.*32001.*tensor"):
        parallel.shardings(lora.partition(config, None, jnp.float32).trainable, mesh)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, 1, 1), "takes 3 devices, but 8"),
        ((-1, 3, 1), "do not divide"),
        ((-1, -1, 1), "at most one"),
        ((0, 1, 1), "positive"),
        ((-2, 1, 1), "positive"),
    ],
)
def test_a_mesh_that_does_not_fit_is_an_error(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(MeshConfig(*sizes), jax.devices()[:8])


def test_the_free_axis_takes_the_devices_that_are_left():
    mesh = make_mesh(MeshConfig(2, -1, 2), jax.devices()[:8])
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}


def test_heads_must_divide_by_the_tensor_axis():
    mesh = make_mesh(MeshConfig(1, 2, 4), jax.devices()[:8])
    with pytest.raises(ValueError, match="2 key/value heads"):
        parallel.check_heads(32, 2, mesh)
    parallel.check_heads(32, 8, mesh)


def test_what_one_process_has_every_process_gets():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = f"""
import jax, sys
from radonc_jax import parallel
jax.distributed.initialize('127.0.0.1:{port}', 2, int(sys.argv[1]))
main = parallel.is_main_process()
def refuse():
    assert main
    raise PermissionError('not for you')
try:
    parallel.on_main(refuse)
except PermissionError as error:
    print(error, end=' ')
own = b'3 answers' if main else b''
def refuse_elsewhere():
    if not main:
        raise ValueError('not here')
    return 'here'
try:
    parallel.on_all(refuse_elsewhere)
except ValueError as error:
    print(error, end=' ')
print(parallel.on_all(lambda: ['x' * (9 - 8 * main), main]), end=' ')
print(parallel.from_main(own), parallel.from_main(b''), parallel.on_main(lambda: [main]))
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(index)],
            cwd=ROOT,
            env=command_environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0].splitlines()[-1] for process in processes]
    gathered = "process 1: not here [['x', True], ['xxxxxxxxx', False]]"
    assert outputs == [f"not for you {gathered} b'3 answers' b'' [True]"] * 2


def test_where_one_process_cannot_use_a_backend_none_does():
    fast, failed = ["cudnn", "passed its self-test"], ["xla", "cudnn attention failed"]
    assert preflight.common_backend([fast, fast]) == ("cudnn", "passed its self-test")
    assert preflight.common_backend([fast, failed]) == ("xla", "process 1: cudnn attention failed")
    assert preflight.common_backend([failed, fast]) == ("xla", "process 0: cudnn attention failed")
    other = ["cudnn_packed", "passed its self-test"]
    told = ("xla", "process 1: passed its self-test")
    assert preflight.common_backend([other, fast]) == told
    assert preflight.common_backend([["xla", "as asked"]] * 2) == ("xla", "as asked")
