"""The decoder against transformers and against itself: packing, cache, each field read."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from radonc_jax.models import huggingface, lora, weight_files
from radonc_jax.models.decoder import Decoder, Llama3RopeScaling, ModelConfig
from radonc_jax.parallel import path_name
from tests import checkpoints


@pytest.mark.parametrize("variant", checkpoints.VARIANTS)
def test_logits_equal_transformers(tmp_path, variant):
    reference = checkpoints.write(tmp_path, variant)
    tokens = checkpoints.tokens()
    window = huggingface.read_config(tmp_path).sliding_window
    assert window is None or window < tokens.shape[1]
    np.testing.assert_allclose(
        checkpoints.logits(checkpoints.model(tmp_path), tokens),
        checkpoints.reference_logits(reference, tokens),
        atol=1e-4,
        rtol=0,
    )


def test_shards_and_one_file_give_the_same_arrays(tmp_path):
    checkpoints.write(tmp_path / "one", "mistral_window")
    checkpoints.write(tmp_path / "many", "mistral_window", shard="20KB")
    assert len(weight_files.file_paths(tmp_path / "many")) > 3
    one = checkpoints.load(tmp_path / "one")[2]
    many = checkpoints.load(tmp_path / "many")[2]
    jax.tree.map(np.testing.assert_array_equal, one, many)


def old_spelling(raw: dict) -> dict:
    """config.json as transformers 4 wrote it."""
    rope = raw.pop("rope_parameters")
    raw["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    raw["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    raw["torch_dtype"] = raw.pop("dtype")
    return raw


@pytest.mark.parametrize("variant", checkpoints.VARIANTS)
def test_both_spellings_of_the_rope_settings(tmp_path, variant):
    checkpoints.write(tmp_path, variant)
    new = huggingface.read_config(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(old_spelling(json.loads(path.read_text()))))
    assert huggingface.read_config(tmp_path) == new


BASE = ModelConfig(
    vocab_size=97,
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    rms_norm_eps=1e-3,
    rope_theta=10000.0,
    rope_scaling=None,
    sliding_window=5,
    tie_word_embeddings=False,
    max_position_embeddings=64,
)
CHANGES = {
    "vocab_size": 98,
    "num_layers": 3,
    "hidden_size": 36,
    "num_heads": 2,
    "num_kv_heads": 4,
    "head_dim": 10,
    "intermediate_size": 50,
    "rms_norm_eps": 1e-1,
    "rope_theta": 500.0,
    "rope_scaling": Llama3RopeScaling(8.0, 1.0, 4.0, 32),
    "sliding_window": 6,
    "tie_word_embeddings": True,
}


def filled(config: ModelConfig) -> Decoder:
    """A decoder whose arrays follow a rule of their path and index, whatever their shape."""
    partition = lora.partition(config, None, jnp.float32)

    def fill(path, leaf):
        index = sum((axis + 1.3) * grid for axis, grid in enumerate(np.indices(leaf.shape)))
        wave = np.sin(sum(path_name(path).encode()) + 12.9898 * index + 0.37 * index**2)
        scale = 1 if path_name(path).endswith("scale") else 0
        return jnp.asarray(scale + 0.3 * wave, jnp.float32)

    arrays = jax.tree_util.tree_map_with_path(fill, partition.trainable)
    return partition.merge(arrays, partition.frozen)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(ModelConfig)])
def test_each_field_of_the_config_is_read(field):
    tokens = checkpoints.tokens(1, 12)
    if field == "max_position_embeddings":
        filled(BASE).init_cache(1, 64)
        with pytest.raises(ValueError, match="max_position_embeddings"):
            filled(dataclasses.replace(BASE, max_position_embeddings=63)).init_cache(1, 64)
        return
    before = checkpoints.logits(filled(BASE), tokens)
    after = checkpoints.logits(filled(dataclasses.replace(BASE, **{field: CHANGES[field]})), tokens)
    assert before.shape != after.shape or np.abs(before - after).max() > 1e-3


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Llama3RopeScaling)])
def test_each_field_of_the_rope_scaling_is_read(field):
    tokens = checkpoints.tokens(1, 12)
    base = dataclasses.replace(BASE, rope_theta=100.0)  # a wavelength in each of the three bands
    scaling = Llama3RopeScaling(8.0, 1.0, 4.0, 32)
    changed = dataclasses.replace(scaling, **{field: 3 * getattr(scaling, field)})
    before, after = (
        checkpoints.logits(filled(dataclasses.replace(base, rope_scaling=s)), tokens)
        for s in (scaling, changed)
    )
    assert np.abs(before - after).max() > 1e-3


@pytest.mark.parametrize("variant", ["llama2_grouped", "mistral_window"])
def test_packed_segments_are_isolated(tmp_path, variant):
    checkpoints.write(tmp_path, variant)
    decoder = checkpoints.model(tmp_path)
    lengths = (7, 3, 9)
    rows = [checkpoints.tokens(1, length, seed=length) for length in lengths]
    positions = jnp.concatenate([jnp.arange(length) for length in lengths])[None]
    segments = jnp.repeat(jnp.arange(1, 4), jnp.array(lengths))[None]

    def packed(rows):
        tokens = jnp.asarray(np.concatenate(rows, axis=1))
        logits, _ = checkpoints.forward(decoder, tokens, positions, segments)
        return np.split(np.asarray(logits), np.cumsum(lengths)[:-1], axis=1)

    together = packed(rows)
    for row, logits in zip(rows, together, strict=True):
        np.testing.assert_allclose(logits, checkpoints.logits(decoder, row), atol=1e-5, rtol=0)
    changed = packed([rows[0], (rows[1] + 1) % 97, rows[2]])
    np.testing.assert_array_equal(changed[0], together[0])
    np.testing.assert_array_equal(changed[2], together[2])
    assert np.abs(changed[1] - together[1]).max() > 1e-2


@pytest.mark.parametrize("variant", ["llama3_scaled_tied", "mistral_window", "mistral_nemo"])
def test_cached_equals_uncached(tmp_path, variant):
    """A prefill and single steps, in rows of unlike length, as decoding does."""
    checkpoints.write(tmp_path, variant)
    decoder = checkpoints.model(tmp_path)
    tokens = checkpoints.tokens(2, 14)
    whole = checkpoints.logits(decoder, tokens)
    cache = decoder.init_cache(2, 16)
    prefill = jnp.asarray(tokens[:, :6])
    logits, cache = checkpoints.forward(
        decoder, prefill, checkpoints.positions(prefill), cache=cache
    )
    np.testing.assert_allclose(logits, whole[:, :6], atol=1e-5, rtol=0)
    offsets = np.array([6, 4])  # the second row is two tokens behind
    for step in range(8):
        at = jnp.asarray(offsets + step)[:, None]
        token = jnp.take_along_axis(jnp.asarray(tokens), at, 1)
        logits, cache = checkpoints.forward(decoder, token, at, cache=cache)
        expected = np.stack([whole[row, offsets[row] + step] for row in range(2)])
        np.testing.assert_allclose(logits[:, 0], expected, atol=1e-5, rtol=0)


def test_positions_beyond_the_cache_are_dropped(tmp_path):
    checkpoints.write(tmp_path, "llama2")
    decoder = checkpoints.model(tmp_path)
    tokens = jnp.asarray(checkpoints.tokens(1, 4))
    empty = decoder.init_cache(1, 8)
    _, cache = checkpoints.forward(decoder, tokens, jnp.arange(4)[None] + 8, cache=empty)
    jax.tree.map(np.testing.assert_array_equal, cache, empty)


@pytest.mark.parametrize("variant", checkpoints.VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_out_again_bit_for_bit(tmp_path, variant, dtype):
    import torch

    checkpoints.write(tmp_path / "in", variant, dtype=getattr(torch, dtype))
    config, _, weights = checkpoints.load(tmp_path / "in", dtype=dtype)
    leaves = jax.tree_util.tree_leaves_with_path(weights)
    huggingface.save_folder(
        tmp_path / "out",
        source=tmp_path / "in",
        weights={path_name(path): leaf for path, leaf in leaves},
        num_layers=config.num_layers,
        shard_bytes=20_000,
    )
    before = load_file(tmp_path / "in" / "model.safetensors")
    after = {}
    for file in weight_files.file_paths(tmp_path / "out"):
        after.update(load_file(file))
    assert set(after) == set(before)
    for name in before:
        assert after[name].dtype == before[name].dtype
        assert after[name].tobytes() == before[name].tobytes(), name
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert str(again.dtype) == f"torch.{dtype}"


@pytest.mark.parametrize("variant", ["llama2", "llama3_scaled_tied", "mistral_window"])
def test_bfloat16_is_as_near_to_float32_as_transformers_is(tmp_path, variant):
    """The bounds are transformers' own distances from its float32, without a factor set by hand.

    A distance is the root mean square over the logits of one input. Rounding makes it vary from
    input to input, by more than the two programs differ, so over all inputs of several models
    together ours must not be larger than theirs. For each input alone, the triangle inequality
    bounds how far the two bfloat16 results may lie apart: by theirs here plus ours, which as just
    said is of the size of theirs; the largest of those stands for it.
    """
    import torch

    ours, theirs, apart = [], [], []
    for seed in range(8):
        folder = tmp_path / str(seed)
        exact = checkpoints.write(folder, variant, seed=seed, dtype=torch.bfloat16).float()
        tokens = checkpoints.tokens(16, 19, seed=seed)
        float32 = checkpoints.reference_logits(exact, tokens)
        reference = checkpoints.reference_logits(exact.bfloat16(), tokens)
        logits = checkpoints.logits(checkpoints.model(folder, "bfloat16"), tokens)
        pairs = ((ours, logits, float32), (theirs, reference, float32), (apart, logits, reference))
        for distances, one, other in pairs:
            distances.append(np.sqrt(np.mean((one - other) ** 2, axis=(1, 2))))
    ours, theirs, apart = (np.concatenate(distances) for distances in (ours, theirs, apart))
    assert np.mean(ours**2) <= np.mean(theirs**2)
    assert (apart <= theirs + theirs.max()).all()
