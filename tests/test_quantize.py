"""Quantised bases: what the codes mean, and that every path works on them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from radonc_jax import parallel
from radonc_jax.models import huggingface, lora, quantize, weight_files
from radonc_jax.models.decoder import PROJECTIONS, ModelConfig
from radonc_jax.parallel import path_name
from radonc_jax.training import step
from radonc_jax.training.optimizer import OptimizerConfig, make_optimizer
from tests import checkpoints

# Wide enough for several tiles of both kinds along every input axis.
WIDE = dict(vocab_size=98, hidden_size=256, intermediate_size=512, num_hidden_layers=2, head_dim=64)
ALL = tuple(PROJECTIONS)
ADAPTER = lora.LoRAConfig(3, 5.0, 0.0, ALL, False, False)
# Appendix E of the QLoRA paper (arXiv 2305.14314).
NORMAL_FLOAT = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip


def slow(kernel: np.ndarray, kind: str, tile: int) -> np.ndarray:
    """The kernel after quantisation, number by number."""
    result = np.empty_like(kernel)
    for row in range(kernel.shape[0]):
        for start in range(0, kernel.shape[1], tile):
            part = kernel[row, start : start + tile]
            largest = np.abs(part).max()
            levels = np.array(NORMAL_FLOAT) if kind == "nf4" else np.arange(-128, 128) / 127.5
            for column, value in enumerate(part, start=start):
                nearest = np.abs(levels * largest - value).argmin()
                result[row, column] = levels[nearest] * largest
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("wide")
    checkpoints.write(path, "mistral_window", **WIDE)
    return path


def load(folder, kind, adapter=None, mesh=None, dtype="float32"):
    """(architecture, partition, weights) with quantised projections."""
    config = huggingface.read_config(folder)
    partition = lora.partition(config, adapter, jnp.dtype(dtype), kind)
    wanted = partition.trainable if adapter is None else partition.frozen
    if mesh is None:
        mesh = parallel.make_mesh(parallel.MeshConfig(1, 1, 1), jax.devices()[:1])
    placements = parallel.shardings(wanted, mesh)
    weights = weight_files.load_weights(
        folder, wanted, placements, jnp.dtype(dtype), config.num_layers
    )
    return config, partition, weights


def by_name(tree) -> dict[str, jax.Array]:
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def dequantized(weights, plain):
    """The same model in floating point: a tree like `plain`."""
    arrays = by_name(weights)

    def pick(path, leaf):
        name = path_name(path)
        if name in arrays:
            return arrays[name]
        place = name.removesuffix("/kernel")
        return quantize.decode(arrays[f"{place}/codes"], arrays[f"{place}/scales"])

    return jax.tree_util.tree_map_with_path(pick, plain)


@pytest.mark.parametrize("kind", quantize.KINDS)
@pytest.mark.parametrize("tile", [8, 32])
def test_codes_mean_what_a_slow_version_says(kind, tile):
    kernel = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    encoded = quantize.encode(jnp.asarray(kernel), kind, tile)
    assert encoded["scales"].shape == (3, 64 // tile)
    assert encoded["codes"].nbytes == kernel.size // (2 if kind == "nf4" else 1)
    decoded, expected = np.asarray(quantize.decode(**encoded)), slow(kernel, kind, tile)
    # A tile's largest weight lies halfway between two levels of int8: either is right.
    halfway = np.abs(np.abs(decoded - kernel) - np.abs(expected - kernel)) < 1e-6
    assert halfway.all()
    same = np.abs(decoded - expected) < 1e-6
    assert same.mean() > 0.95 and (kind == "int8" or same.all())


@pytest.mark.parametrize("kind", quantize.KINDS)
def test_a_layer_of_zeros_stays_zero(kind):
    encoded = quantize.encode(jnp.zeros((2, 64)), kind, 64)
    np.testing.assert_array_equal(quantize.decode(**encoded), np.zeros((2, 64)))


@pytest.mark.parametrize("kind", quantize.KINDS)
def test_logits_are_those_of_the_dequantised_model(folder, kind):
    tokens = checkpoints.tokens()
    architecture, partition, weights = load(folder, kind)
    logits = checkpoints.logits(partition.merge(weights, partition.frozen), tokens)
    plain = lora.partition(architecture, None, jnp.float32)
    arrays = dequantized(weights, plain.trainable)
    expected = checkpoints.logits(plain.merge(arrays, plain.frozen), tokens)
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
    # Only the projections are quantised: the rest is the checkpoint's own.
    exact = by_name(checkpoints.load(folder)[2])
    for name, array in by_name(arrays).items():
        difference = np.linalg.norm(array - exact[name]) / np.linalg.norm(exact[name])
        bounds = {"int8": (0.002, 0.008), "nf4": (0.07, 0.11)}[kind]  # of normal weights
        if "_proj" in name:
            assert bounds[0] < difference < bounds[1], name
        else:
            assert difference == 0, name


@pytest.mark.parametrize("kind", quantize.KINDS)
@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 2, 2), (1, 2, 2)])
def test_every_placement_holds_the_same_codes(folder, kind, mesh):
    one = by_name(load(folder, kind, ADAPTER)[2])
    config = parallel.MeshConfig(*mesh)
    mesh = parallel.make_mesh(config, jax.devices()[: np.prod(mesh)])
    several = by_name(load(folder, kind, ADAPTER, mesh)[2])
    assert set(one) == set(several)
    for name, array in several.items():
        np.testing.assert_array_equal(array, one[name], err_msg=name)
        own = array.addressable_shards[0].data.size
        if "codes" in name and config.fsdp * config.tensor > 1:
            assert own == array.size // (config.fsdp * config.tensor), name


def test_a_mesh_that_cuts_tiles_is_refused(tmp_path):
    checkpoints.write(tmp_path, "llama2")  # hidden size 32: one tile
    mesh = parallel.make_mesh(parallel.MeshConfig(1, 2, 1), jax.devices()[:2])
    with pytest.raises(ValueError, match="scales.* cannot be split into 2 along .*'fsdp'"):
        load(tmp_path, "nf4", ADAPTER, mesh)


@pytest.mark.parametrize("kind", quantize.KINDS)
@pytest.mark.parametrize("dora", [False, True])
def test_gradients_are_those_on_the_dequantised_base(folder, kind, dora):
    adapter = lora.LoRAConfig(3, 5.0, 0.0, ALL, False, dora)
    architecture, partition, frozen = load(folder, kind, adapter)
    plain = lora.partition(architecture, adapter, jnp.float32)
    base = dequantized(frozen, plain.frozen)
    tokens = jnp.asarray(checkpoints.tokens())
    start = lora.init(partition.trainable, frozen, 0)
    again = lora.init(plain.trainable, base, 0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), start, again)
    rng = np.random.default_rng(1)
    start = jax.tree.map(lambda x: x + 0.05 * rng.standard_normal(x.shape, np.float32), start)

    def gradient(partition, frozen):
        def loss(trainable):
            model = partition.merge(trainable, frozen)
            hidden, _ = model(tokens, checkpoints.positions(tokens))
            return jnp.mean(model.logits(hidden) ** 2)

        return jax.jit(jax.grad(loss), compiler_options=checkpoints.FAST_COMPILE)(start)

    ours, expected = by_name(gradient(partition, frozen)), by_name(gradient(plain, base))
    for name, array in ours.items():
        error = np.linalg.norm(array - expected[name]) / np.linalg.norm(expected[name])
        assert error < 1e-4, name


def test_what_does_not_suit_is_refused():
    sizes = dict(
        vocab_size=9, num_layers=1, hidden_size=36, num_heads=3, num_kv_heads=3, head_dim=12,
        intermediate_size=64, rms_norm_eps=1e-5, rope_theta=1e4, rope_scaling=None,
        sliding_window=None, tie_word_embeddings=False, max_position_embeddings=8,
    )  # fmt: skip
    with pytest.raises(
        ValueError, match='size of 36 has no tiles .* set precision.base="bfloat16"'
    ):
        lora.partition(ModelConfig(**sizes), None, jnp.float32, "nf4")
    with pytest.raises(ValueError, match="int8 or nf4, not 'fp4'"):
        lora.partition(ModelConfig(**sizes), None, jnp.float32, "fp4")


MISTRAL_7B = ModelConfig(
    vocab_size=32000, num_layers=32, hidden_size=4096, num_heads=32, num_kv_heads=8, head_dim=128,
    intermediate_size=14336, rms_norm_eps=1e-5, rope_theta=1e4, rope_scaling=None,
    sliding_window=4096, tie_word_embeddings=False, max_position_embeddings=32768,
)  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "tile"),
    [
        ((4096, 5120, 8192, 14336, 28672, 3072, 2048), 64),
        ((11008,), 32),  # LLaMA-2-7B
        ((13824,), 64),  # LLaMA-2-13B
    ],
)
def test_eight_devices_can_share_every_input_of_the_published_models(sizes, tile):
    for size in sizes:
        assert quantize.tile_size(size) == tile
        assert size // tile % 8 == 0


@pytest.mark.parametrize("kind", ["nf4", "int8", None])
def test_a_fresh_dora_adapter_needs_one_layer_of_the_base_at_a_time(kind):
    config = lora.LoRAConfig(3, 5.0, 0.0, ("up_proj",), False, True)
    sizes = dict(vars(MISTRAL_7B), num_layers=16, hidden_size=64, intermediate_size=256, head_dim=8)
    partition = lora.partition(ModelConfig(**sizes), config, jnp.float32, kind)
    start = jax.jit(lambda frozen: lora.init(partition.trainable, frozen, 0))
    memory = start.lower(partition.frozen).compile().memory_analysis()
    whole = 16 * 64 * 256 * 4
    assert memory.temp_size_in_bytes < whole / 4


@pytest.mark.slow
def test_training_mistral_7b_on_nf4_fits_12_gb():
    """A row of 512 tokens at a time: what the compiled step itself says it needs.

    Compiled for a CPU, which keeps float32 copies of what is multiplied in bfloat16: more than a
    GPU needs. (Several microbatches in one step would add 2 GB of such copies.)
    """
    config = lora.LoRAConfig(16, 32.0, 0.0, ALL, False, False)
    partition = lora.partition(MISTRAL_7B, config, jnp.bfloat16, "nf4")
    optimizer = make_optimizer(OptimizerConfig(2e-4, "cosine", 0.03, 0.0, 1.0, 0.9, 0.999), 100)
    mesh = parallel.make_mesh(parallel.MeshConfig(1, 1, 1), jax.devices()[:1])
    shapes, _ = step.state_shardings(partition, optimizer, mesh)

    def stored(path, leaf):
        kept = path_name(path).endswith(("codes", "scales"))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if kept else jnp.bfloat16)

    base = jax.tree_util.tree_map_with_path(stored, partition.frozen)
    microbatches, rows, length, answers = 1, 1, 512, 64
    places = dict(tokens=length, positions=length, segment_ids=length) | dict(
        answer_index=answers, targets=answers
    )
    batch = {
        name: jax.ShapeDtypeStruct((microbatches, rows, size), jnp.int32)
        for name, size in places.items()
    }
    batch["weights"] = jax.ShapeDtypeStruct((microbatches, rows, answers), jnp.float32)
    train_step = functools.partial(step.train_step, partition, optimizer, 0)
    lowered = jax.jit(train_step, donate_argnums=0).lower(shapes, base, batch)
    # Optimised as in use: the suite's own flags ask for quick compilation, which wastes memory.
    compiled = lowered.compile(compiler_options={"xla_backend_optimization_level": 3})
    memory = compiled.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    needed += memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert 4e9 < memory.argument_size_in_bytes < 5.5e9  # 4.5 bits a weight, not 8 or 16
    assert needed < 12e9, f"{needed / 1e9:.1f} GB"


@pytest.mark.parametrize("kind", quantize.KINDS)
def test_a_merged_module_can_be_taken_apart_again(folder, kind):
    """A notebook gets the NNX module itself."""
    _, partition, weights = load(folder, kind)
    model = partition.merge(weights, partition.frozen)
    assert isinstance(model.layers.mlp.up_proj, quantize.QuantizedLinear)
    assert set(by_name(nnx.state(model, nnx.Param))) == set(by_name(weights))
