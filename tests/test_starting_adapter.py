"""Training from a given adapter: placed as the run's own, equal to it at step 0, or refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from radonc_jax import loading, parallel, tracking
from radonc_jax.data.batches import BatchConfig, Batches, Example
from radonc_jax.models import lora
from radonc_jax.models import peft as folders
from radonc_jax.training import step
from tests import checkpoints
from tests.test_peft import write_adapter

CONFIG = lora.LoRAConfig(
    rank=4,
    alpha=5,
    dropout=0.0,
    targets=("q_proj", "down_proj"),
    rslora=True,
    dora=True,
    rank_pattern={"q_proj": 2},
    alpha_pattern={"down_proj": 3},
)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(folder of the base, folder of the adapter, the adapted model of peft)."""
    path = tmp_path_factory.mktemp("start")
    model = checkpoints.write(path / "base", "llama2", vocab_size=96)  # divides by 2
    theirs = write_adapter(
        model,
        path / "adapter",
        r=CONFIG.rank,
        lora_alpha=CONFIG.alpha,
        lora_dropout=0.3,
        target_modules=list(CONFIG.targets),
        use_rslora=True,
        use_dora=True,
        rank_pattern={"q_proj": 2},
        alpha_pattern={"down_proj": 3},
    )
    return path / "base", path / "adapter", theirs


def starting_from(folder, **changes):
    return dataclasses.replace(CONFIG, init_from=str(folder), **changes)


def test_the_loss_at_step_0_is_that_of_the_adapter_in_peft(written):
    base, folder, theirs = written
    config = starting_from(folder)
    architecture, partition, frozen = checkpoints.load(base, config)
    mesh = parallel.make_mesh(parallel.MeshConfig(2, 2, 2))
    adapter = loading.starting_adapter(config, architecture.num_layers).load(partition, mesh)
    placements = parallel.shardings(partition.trainable, mesh)
    assert jax.tree.map(lambda leaf: leaf.sharding, adapter) == placements
    frozen = jax.device_put(frozen, parallel.shardings(frozen, mesh))

    rng = np.random.default_rng(3)
    examples = [
        Example(f"case{n}", tuple(rng.integers(3, 96, 9)), tuple(rng.integers(3, 96, 4)))
        for n in range(8)
    ]
    settings = BatchConfig(8, 1, 16, False, "fail")
    batch = Batches(examples, settings, epochs=1, seed=None, row_multiple=4)[0]
    with jax.set_mesh(mesh):
        placed = parallel.put(batch, mesh, None, parallel.BATCH_AXES)
        evaluate = jax.jit(
            lambda *arrays: step.evaluation_step(partition, *arrays),
            compiler_options=checkpoints.FAST_COMPILE,
        )
        sums = jax.device_get(evaluate(adapter, frozen, placed))

    tokens = torch.tensor([[*example.prompt, *example.answer] for example in examples])
    with torch.no_grad():
        logits = theirs(tokens).logits[:, 8:-1].flatten(0, 1)
        expected = torch.nn.functional.cross_entropy(logits, tokens[:, 9:].flatten())
    assert sums["answer_tokens"] == 8 * 4
    np.testing.assert_allclose(sums["loss_sum"] / (8 * 4), expected.item(), rtol=1e-5)


def test_its_files_are_hashed(written):
    _, folder, _ = written
    origin = loading.starting_adapter(starting_from(folder), 3).origin()
    assert (origin["folder"], origin["step"]) == (str(folder), None)
    assert origin["sha256"] == {
        name: tracking.file_sha256(folder / name) for name in (folders.CONFIG, folders.WEIGHTS)
    }


def test_a_fresh_adapter_starts_from_nothing():
    assert loading.starting_adapter(CONFIG, 3) is None
    assert dataclasses.replace(CONFIG, init_from=None) == CONFIG


def test_the_dropout_and_the_order_of_targets_may_differ(written):
    targets = tuple(reversed(CONFIG.targets))
    config = starting_from(written[1], dropout=0.5, targets=targets)
    assert loading.starting_adapter(config, 3) is not None


def test_every_difference_is_named_at_once(written):
    other = lora.LoRAConfig(
        rank=8,
        alpha=5,
        dropout=0.0,
        targets=("q_proj", "v_proj"),
        rslora=False,
        dora=False,
        alpha_pattern={"q_proj": 7},
        init_from=str(written[1]),
    )
    with pytest.raises(ValueError) as error:
        loading.starting_adapter(other, 3)
    told = str(error.value)
    assert "\n" not in told and told.startswith("lora.init_from: ")
    for part in (
        "rslora is True there and False here",
        "dora is True there and False here",
        "targets are ['down_proj', 'q_proj'] there and ['q_proj', 'v_proj'] here",
        "the rank of q_proj is 2 there and 8 here",
        "the alpha of q_proj is 5 there and 7 here",
    ):
        assert part in told
    with pytest.raises(ValueError, match="rank of down_proj is 4 there and 6 here"):
        loading.starting_adapter(starting_from(written[1], rank=6), 3)


def test_a_folder_without_an_adapter_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="lora.init_from: .*is not a PEFT folder"):
        loading.starting_adapter(starting_from(tmp_path), 3)


def test_an_adapter_of_another_model_is_refused(written, tmp_path):
    """Before the base is read: its own tensors are enough to tell."""
    checkpoints.write(tmp_path, "llama2", hidden_size=40, num_hidden_layers=2)
    config = starting_from(written[1])
    architecture, partition, _ = checkpoints.load(tmp_path, config)
    mesh = parallel.make_mesh(parallel.MeshConfig(-1, 1, 1), jax.devices()[:1])
    name = next(name for name in load_file(written[1] / folders.WEIGHTS) if "layers.2." in name)
    with pytest.raises(ValueError, match="does not fit the model: unexpected tensor") as error:
        loading.starting_adapter(config, architecture.num_layers).load(partition, mesh)
    assert name in str(error.value)


def test_float32_arrays_are_what_the_file_holds(written):
    base, folder, _ = written
    config = starting_from(folder)
    _, partition, _ = checkpoints.load(base, config)
    mesh = parallel.make_mesh(parallel.MeshConfig(-1, 1, 1), jax.devices()[:1])
    adapter = loading.starting_adapter(config, 3).load(partition, mesh)
    tensors = load_file(folder / folders.WEIGHTS)
    count = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(adapter):
        assert leaf.dtype == jnp.float32
        names = folders.tensor_names(parallel.path_name(path), 3)
        for name, layer in zip(names, np.asarray(leaf), strict=True):
            np.testing.assert_array_equal(layer, tensors[name])
            count += 1
    assert count == len(tensors)
