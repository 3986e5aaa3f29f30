"""Adapters: start equal to the base, touch only their targets, agree with peft."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
from flax import nnx
from peft.optimizers import create_loraplus_optimizer

from radonc_jax import parallel
from radonc_jax.models import lora
from radonc_jax.models.decoder import Decoder, Linear
from radonc_jax.models.peft import tensor_names
from radonc_jax.parallel import path_name
from radonc_jax.training.checkpoint import Checkpoints, Progress
from radonc_jax.training.optimizer import OptimizerConfig, make_optimizer
from radonc_jax.training.step import TrainState, state_shardings
from tests import checkpoints

ALL = tuple(lora.PROJECTIONS)
KINDS = {
    "plain": dict(rslora=False, dora=False),
    "rslora": dict(rslora=True, dora=False),
    "dora": dict(rslora=False, dora=True),
    "rslora_dora": dict(rslora=True, dora=True),
}


PATTERNS = {
    "rank_pattern": {"q_proj": 5, "down_proj": 1, "up_proj": 3},
    "alpha_pattern": {"q_proj": 11, "o_proj": 2.5},
}


def settings(targets=ALL, kind="plain", dropout=0.0, patterns=False) -> lora.LoRAConfig:
    """Rank 3 and alpha 5, for all targets or all but those of `PATTERNS`."""
    own = PATTERNS if patterns else {}
    return lora.LoRAConfig(rank=3, alpha=5, dropout=dropout, targets=targets, **KINDS[kind], **own)


def random_adapter(abstract, frozen, seed=1):
    """An adapter whose arrays are all away from their start."""
    start = lora.init(abstract, frozen, seed)
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: np.asarray(x) + 0.1 * rng.standard_normal(x.shape).astype(np.float32), start
    )


def by_name(tree) -> dict[str, jax.Array]:
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def with_peft(model, config: lora.LoRAConfig, adapter):
    """The transformers model with the same adapter in peft."""
    model = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            target_modules=list(config.targets),
            rank_pattern=dict(config.rank_pattern),
            alpha_pattern=dict(config.alpha_pattern),
            use_rslora=config.rslora,
            use_dora=config.dora,
            task_type="CAUSAL_LM",
        ),
    )
    tensors = {
        name: torch.from_numpy(np.array(layer))
        for path, leaf in by_name(jax.device_get(adapter)).items()
        for name, layer in zip(tensor_names(path, len(leaf)), leaf, strict=True)
    }
    result = peft.set_peft_model_state_dict(model, tensors)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora" in key]
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    checkpoints.write(path, "mistral_window")
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_start_equals_the_base_exactly(folder, dtype):
    tokens = checkpoints.tokens()
    base = checkpoints.logits(checkpoints.model(folder, dtype), tokens)
    _, partition, frozen = checkpoints.load(folder, settings(), dtype)
    adapter = lora.init(partition.trainable, frozen, seed=0)
    np.testing.assert_array_equal(
        checkpoints.logits(partition.merge(adapter, frozen), tokens), base
    )
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(adapter))


def test_dora_starts_at_the_base_up_to_the_norm(folder):
    tokens = checkpoints.tokens()
    base = checkpoints.logits(checkpoints.model(folder), tokens)
    _, partition, frozen = checkpoints.load(folder, settings(kind="dora"))
    adapter = lora.init(partition.trainable, frozen, seed=0)
    logits = checkpoints.logits(partition.merge(adapter, frozen), tokens)
    np.testing.assert_allclose(logits, base, atol=1e-5, rtol=0)


def test_only_the_targets_are_adapted(folder):
    _, partition, _ = checkpoints.load(folder, settings(("q_proj", "down_proj")))
    assert set(by_name(partition.trainable)) == {
        "layers/self_attn/q_proj/a",
        "layers/self_attn/q_proj/b",
        "layers/mlp/down_proj/a",
        "layers/mlp/down_proj/b",
    }
    adapted = {name for name in by_name(partition.frozen) if name.endswith("base/kernel")}
    assert adapted == {"layers/self_attn/q_proj/base/kernel", "layers/mlp/down_proj/base/kernel"}
    hidden, rank, mlp, layers = 32, 3, 48, 3
    expected = layers * rank * (hidden + hidden + mlp + hidden)
    assert lora.count(partition.trainable) == expected


def test_a_second_adapter_is_refused(folder):
    config = checkpoints.load(folder)[0]
    model = Decoder(config, rngs=nnx.Rngs(0))
    lora.inject(model, settings(("q_proj",)))
    with pytest.raises(ValueError, match="1 of 2 projections"):
        lora.inject(model, settings(("q_proj", "v_proj")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": ("q_proj", "lm_head")}, "lm_head"),
        ({"targets": ()}, "once"),
        ({"targets": ("q_proj", "q_proj")}, "once"),
        ({"rank": 0}, "rank"),
        ({"rank": 2.5}, "rank"),
        ({"rank": True}, "rank"),
        ({"alpha": 0}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\]"),
        ({"rank_pattern": {"v_proj": 2}}, "rank_pattern names .*v_proj.* lora.targets"),
        ({"alpha_pattern": {"q_proj": "2"}}, r"alpha_pattern\['q_proj'\]"),
        ({"alpha_pattern": 3}, "alpha_pattern must map"),
        ({"init_from": 3}, "init_from"),
    ],
)
def test_bad_settings_are_named(change, message):
    good = dict(rank=3, alpha=5, dropout=0.0, targets=("q_proj",), rslora=False, dora=False)
    with pytest.raises(ValueError, match=message):
        lora.LoRAConfig(**{**good, **change})


def test_each_target_has_its_own_rank_and_alpha(folder):
    config = settings(patterns=True)
    # Entries that say what holds anyway are no difference; the order of a mapping neither.
    assert config.rank_pattern == (("down_proj", 1), ("q_proj", 5))
    turned = dict(reversed(PATTERNS["rank_pattern"].items()))
    same = dataclasses.replace(config, rank_pattern=turned)
    assert same == config and hash(same) == hash(config)
    assert config.of("q_proj") == dataclasses.replace(settings(("q_proj",)), rank=5, alpha=11)
    assert config.of("v_proj") == settings(("v_proj",))
    assert dataclasses.replace(config, rslora=True).of("q_proj").scale == 11 / 5**0.5
    with pytest.raises(ValueError, match="differ between targets"):
        _ = config.scale
    _, partition, _ = checkpoints.load(folder, config)
    ranks = {path: leaf.shape[1] for path, leaf in by_name(partition.trainable).items()}
    assert ranks["layers/self_attn/q_proj/a"] == 5
    assert ranks["layers/mlp/down_proj/a"] == 1
    assert ranks["layers/self_attn/v_proj/a"] == ranks["layers/mlp/up_proj/a"] == 3


@pytest.mark.parametrize(
    ("kind", "targets", "patterns"),
    [
        ("plain", ("q_proj", "v_proj"), False),
        ("plain", ALL, True),
        ("rslora", ALL, False),
        ("dora", ALL, False),
        ("dora", ("o_proj", "up_proj"), False),
        ("rslora_dora", ALL, True),
    ],
)
def test_forward_and_gradients_equal_peft(tmp_path, kind, targets, patterns):
    reference = checkpoints.write(tmp_path, "mistral_window")
    config = settings(targets, kind, patterns=patterns)
    _, partition, frozen = checkpoints.load(tmp_path, config)
    adapter = random_adapter(partition.trainable, frozen)
    tokens = checkpoints.tokens()
    theirs = with_peft(reference, config, adapter)
    target = np.random.default_rng(3).standard_normal((*tokens.shape, 97)).astype(np.float32)

    def loss(adapter):
        decoder = partition.merge(adapter, frozen)
        hidden, _ = decoder(jnp.asarray(tokens), checkpoints.positions(tokens))
        logits = decoder.logits(hidden)
        return jnp.sum(logits * target), logits

    step = jax.value_and_grad(loss, has_aux=True)
    (_, logits), gradient = jax.jit(step, compiler_options=checkpoints.FAST_COMPILE)(adapter)
    expected = theirs(torch.from_numpy(tokens)).logits
    np.testing.assert_allclose(logits, expected.detach().numpy(), atol=1e-4, rtol=0)

    (expected * torch.from_numpy(target)).sum().backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    compared = 0
    for path, ours in by_name(jax.device_get(gradient)).items():
        for name, layer in zip(tensor_names(path, len(ours)), ours, strict=True):
            name = name.removesuffix(".weight")
            ending = ".default.weight"
            want = gradients[name + ending].numpy()
            assert np.linalg.norm(want) > 0
            error = np.linalg.norm(layer - want) / np.linalg.norm(want)
            assert error < 1e-4, f"{name}: relative error {error}"
            compared += 1
    assert compared == len(gradients)


@pytest.mark.parametrize("kind", ["plain", "dora"])
def test_dropout(folder, kind):
    """Off without a key, a function of the key with one, and other per layer and projection."""
    tokens = checkpoints.tokens()
    _, partition, frozen = checkpoints.load(folder, settings(kind=kind, dropout=0.5))
    adapter = random_adapter(partition.trainable, frozen)
    _, without, _ = checkpoints.load(folder, settings(kind=kind))

    def logits(key):
        return checkpoints.logits(partition.merge(adapter, frozen, key), tokens)

    off = checkpoints.logits(without.merge(adapter, frozen), tokens)
    np.testing.assert_array_equal(logits(None), off)
    first, again, other = (logits(jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    assert np.abs(first - off).max() > 1e-3
    keys = by_name(partition.keys)
    assert all(leaf.shape == (3, 2) for leaf in keys.values()) and len(keys) == len(ALL)


def test_dropout_drops_its_share_and_keeps_the_mean():
    """Of an adapter alone: the base's path sees every input."""
    config = settings(("q_proj",), dropout=0.25)
    layer = lora.LoRALinear(Linear(1, 4000, layers=1, rngs=nnx.Rngs(0)), config)
    # As the scan hands it over: one layer's arrays, without the leading axis.
    layer.base.kernel = nnx.Param(jnp.zeros((1, 4000)))
    layer.a = lora.LoRAParam(jnp.ones((3, 4000)) / 3)
    layer.b = lora.LoRAParam(jnp.ones((1, 3)))
    layer.dropout_key = lora.DropoutKey(jax.random.key_data(jax.random.key(5)))
    total = layer(jnp.ones((8, 4000)))[:, 0] / config.scale  # sum of kept inputs / 0.75
    kept = np.asarray(total) * 0.75 / 4000
    np.testing.assert_allclose(kept, 0.75, atol=0.03)
    assert len(np.unique(kept)) > 1  # each row draws its own


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_equal_the_adapter(folder, kind):
    tokens = checkpoints.tokens()
    config = settings(kind=kind, patterns=kind in ("plain", "rslora_dora"))
    architecture, partition, frozen = checkpoints.load(folder, config)
    adapter = random_adapter(partition.trainable, frozen)
    unmerged = checkpoints.logits(partition.merge(adapter, frozen), tokens)
    plain = lora.partition(architecture, None, jnp.float32)
    base, parts = by_name(frozen), by_name(adapter)

    def merge(path, leaf):
        place = path_name(path).removesuffix("/kernel")
        if f"{place}/a" not in parts:
            return base[path_name(path)]
        row = [parts.get(f"{place}/{part}") for part in ("a", "b", "magnitude")]
        own = config.of(place.rsplit("/", 1)[1])
        return lora.adapted_kernel(base[f"{place}/base/kernel"], *row, own)

    arrays = jax.tree_util.tree_map_with_path(merge, plain.trainable)
    logits = checkpoints.logits(plain.merge(arrays, plain.frozen), tokens)
    np.testing.assert_allclose(logits, unmerged, atol=1e-4, rtol=0)
    base = checkpoints.logits(checkpoints.model(folder), tokens)
    assert np.abs(unmerged - base).max() > 1e-1


def test_lora_plus_trains_as_peft_does(tmp_path):
    """Five steps with weight decay and a falling rate, forward to update on each side alone."""
    rate, ratio, decay, steps = 3e-3, 16.0, 0.1, 5
    reference = checkpoints.write(tmp_path, "mistral_window")
    config = settings(("q_proj", "down_proj"), "dora")
    _, partition, frozen = checkpoints.load(tmp_path, config)
    adapter = random_adapter(partition.trainable, frozen)
    start = by_name(jax.device_get(adapter))
    tokens = checkpoints.tokens()
    theirs = with_peft(reference, config, adapter)
    torch_optimizer = create_loraplus_optimizer(
        theirs,
        torch.optim.AdamW,
        lr=rate,
        loraplus_lr_ratio=ratio,
        loraplus_weight_decay=decay,
        betas=(0.9, 0.99),
    )
    falling = torch.optim.lr_scheduler.LambdaLR(torch_optimizer, lambda step: 1 - step / steps)
    for _ in range(steps):
        torch_optimizer.zero_grad()
        theirs(torch.from_numpy(tokens)).logits.square().mean().backward()
        torch_optimizer.step()
        falling.step()

    plus = OptimizerConfig(rate, "linear", 0.0, decay, 0.0, 0.9, 0.99, loraplus_ratio=ratio)

    def loss(adapter):
        decoder = partition.merge(adapter, frozen)
        hidden, _ = decoder(jnp.asarray(tokens), checkpoints.positions(tokens))
        return jnp.mean(decoder.logits(hidden) ** 2)

    optimizer = make_optimizer(plus, steps)

    def step(carry, _):
        adapter, state = carry
        updates, state = optimizer.update(jax.grad(loss)(adapter), state, adapter)
        return (optax.apply_updates(adapter, updates), state), None

    @partial(jax.jit, compiler_options=checkpoints.FAST_COMPILE)
    def train(adapter):
        return jax.lax.scan(step, (adapter, optimizer.init(adapter)), length=steps)[0][0]

    trained = train(adapter)
    expected = {name: p.detach().numpy() for name, p in theirs.named_parameters()}
    for path, ours in by_name(jax.device_get(trained)).items():
        for layer, name in enumerate(tensor_names(path, 3)):
            want = expected[name.removesuffix(".weight") + ".default.weight"]
            moved = np.linalg.norm(want - start[path][layer])
            error = np.linalg.norm(ours[layer] - want) / moved
            assert moved > 0 and error < 1e-3, f"{name}: {error} of its way"


def test_the_state_of_lora_plus_is_placed_and_restored(folder, tmp_path):
    config = settings(("q_proj", "down_proj"), "dora")
    _, partition, frozen = checkpoints.load(folder, config)
    adapter = random_adapter(partition.trainable, frozen)
    plus = OptimizerConfig(1e-3, "cosine", 0.1, 0.1, 1.0, 0.9, 0.99, loraplus_ratio=4.0)
    optimizer = make_optimizer(plus, 9)
    mesh = parallel.make_mesh(parallel.MeshConfig(2, 2, 2))
    shapes, placements = state_shardings(partition, optimizer, mesh)
    # Moments that are not zero: any array of the state's shapes will do.
    moments = jax.tree.map(lambda leaf: np.arange(leaf.size).reshape(leaf.shape), shapes.optimizer)
    moments = jax.tree.map(lambda x, leaf: x.astype(leaf.dtype), moments, shapes.optimizer)
    state = jax.device_put(TrainState(jnp.int32(3), adapter, moments), placements)
    checkpoint = Checkpoints(tmp_path)
    checkpoint.save(3, state, Progress())
    number, again, _ = checkpoint.restore_newest(shapes, placements)
    assert number == 3
    checkpoint.close()
    jax.tree.map(np.testing.assert_array_equal, again, state)
    assert len(jax.tree.leaves(again.optimizer)) >= 2 * len(jax.tree.leaves(adapter))
