"""What int8 and nf4 bases cost and save: logits, memory, speed of a training step and of decoding.

    python benchmarks/quantization.py                  about 30 million random weights
    python benchmarks/quantization.py --size=7b        Mistral-7B shapes, on a GPU

Weights are drawn at random (normal, the scale of trained ones), so errors are those of a normal
distribution: real checkpoints have outliers, and differ. The three bases take turns in one process.
Prints a table and writes JSON.
"""

import functools
import platform
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from radonc_jax import parallel, tracking
from radonc_jax.decoding.scheduler import Scheduler
from radonc_jax.models import lora, quantize
from radonc_jax.models.decoder import PROJECTIONS, ModelConfig
from radonc_jax.parallel import path_name
from radonc_jax.training import step
from radonc_jax.training.optimizer import OptimizerConfig, make_optimizer

_SIZE = flags.DEFINE_enum("size", "30m", ["30m", "7b"], "Model.")
_RUNS = flags.DEFINE_integer("runs", 5, "Timed runs of each base.", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", "benchmarks/results/quantization.json", "JSON to write.")

BASES = ("bfloat16", "int8", "nf4")
SIZES = {
    "30m": dict(vocab_size=8000, num_layers=8, hidden_size=512, num_heads=8, num_kv_heads=2,
                head_dim=64, intermediate_size=1536),
    "7b": dict(vocab_size=32000, num_layers=32, hidden_size=4096, num_heads=32, num_kv_heads=8,
               head_dim=128, intermediate_size=14336),
}  # fmt: skip
ADAPTER = lora.LoRAConfig(16, 32.0, 0.0, tuple(PROJECTIONS), False, False)
ROWS, LENGTH, ANSWERS = 4, 512, 64  # of a training step
PROMPTS, PROMPT_LENGTH, NEW_TOKENS = 32, 192, 16


def main(argv):
    del argv
    config = ModelConfig(
        **SIZES[_SIZE.value],
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        rope_scaling=None,
        sliding_window=None,
        tie_word_embeddings=False,
        max_position_embeddings=4096,
    )
    mesh = parallel.make_mesh(parallel.MeshConfig(-1, 1, 1))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (4, 256)).astype(np.int32)
    table, runs, logits = {}, {}, {}
    for base in BASES:  # one after the other: three 7B models do not fit
        partition, frozen = random_base(config, base)
        logits[base] = base_logits(partition, frozen, tokens)
        train, decode = (
            make_training(partition, frozen, config),
            make_decoding(partition, frozen, config, mesh),
        )
        timed = {"train": [], "decode": []}
        for number in range(_RUNS.value + 1):
            for name, run in (("train", train), ("decode", decode)):
                start = time.perf_counter()
                run()
                if number:  # the first run compiles
                    timed[name].append(time.perf_counter() - start)
        runs[base] = timed
        error = logits[base] - logits["bfloat16"]
        table[base] = {
            "weights_bytes": sum(stored_bytes(leaf) for leaf in jax.tree.leaves(frozen)),
            "relative_logit_error": float(
                np.linalg.norm(error) / np.linalg.norm(logits["bfloat16"])
            ),
            "same_top_token": float(
                np.mean(logits[base].argmax(-1) == logits["bfloat16"].argmax(-1))
            ),
            "train_tokens_per_second": ROWS * LENGTH / statistics.median(timed["train"]),
            "decoded_tokens_per_second": PROMPTS * NEW_TOKENS / statistics.median(timed["decode"]),
        }
        del partition, frozen, train, decode
    device = jax.devices()[0].device_kind
    print(f"{_SIZE.value} random weights on {device}; logits against the bfloat16 base")
    print(f"{'base':10}{'weights GB':>12}{'logit error':>13}{'same token':>12}", end="")
    print(f"{'training tok/s':>16}{'decoding tok/s':>16}")
    for base, row in table.items():
        print(
            f"{base:10}{row['weights_bytes'] / 1e9:12.3f}{row['relative_logit_error']:13.4f}"
            f"{row['same_top_token']:12.3f}{row['train_tokens_per_second']:16,.0f}"
            f"{row['decoded_tokens_per_second']:16,.0f}"
        )
    result = {"size": _SIZE.value, "bases": table, "seconds": runs, "machine": platform.platform()}
    tracking.write_json(Path(_OUTPUT.value), result | {"environment": tracking.environment()})


def random_base(config: ModelConfig, base: str):
    """(partition, frozen arrays); the same draw for every base, kernel by kernel."""
    quantized = base if base in quantize.KINDS else None
    partition = lora.partition(config, ADAPTER, jnp.bfloat16, quantized)
    plain = lora.partition(config, ADAPTER, jnp.bfloat16).frozen
    drawn = {}

    @functools.partial(jax.jit, static_argnums=(1, 2, 3))
    def draw(key, shape, scale, tile):
        def layer(key):
            kernel = scale * jax.random.normal(key, shape[1:], jnp.float32)
            kernel = kernel.astype(jnp.bfloat16)
            return kernel if tile is None else quantize.encode(kernel, base, tile)

        return jax.lax.map(layer, jax.random.split(key, shape[0]))

    for number, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(plain)):
        name, key = path_name(path), jax.random.key(number)
        if name.endswith("scale"):
            drawn[name] = jnp.ones(leaf.shape, jnp.bfloat16)
        elif "_proj" not in name:
            drawn[name] = draw(key, (1, *leaf.shape), leaf.shape[-1] ** -0.5, None)[0]
        elif quantized is None:
            drawn[name] = draw(key, leaf.shape, leaf.shape[-1] ** -0.5, None)
        else:
            tile = quantize.tile_size(leaf.shape[-1])
            codes = draw(key, leaf.shape, leaf.shape[-1] ** -0.5, tile)
            drawn |= {name.removesuffix("kernel") + kind: x for kind, x in codes.items()}
    frozen = jax.tree_util.tree_map_with_path(
        lambda path, leaf: drawn[path_name(path)], partition.frozen
    )
    return partition, frozen


def stored_bytes(leaf) -> int:
    return leaf.size * leaf.dtype.itemsize


def base_logits(partition, frozen, tokens) -> np.ndarray:
    adapter = lora.init(partition.trainable, frozen, 0)  # b is zero: the base alone

    @jax.jit
    def run(adapter, frozen, tokens):
        model = partition.merge(adapter, frozen)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return model.logits(model(tokens, positions)[0])

    return np.asarray(run(adapter, frozen, tokens))


def make_training(partition, frozen, config: ModelConfig):
    optimizer = make_optimizer(OptimizerConfig(2e-4, "constant", 0.0, 0.0, 1.0, 0.9, 0.999), 100)
    adapter = lora.init(partition.trainable, frozen, 0)
    state = [step.TrainState(jnp.int32(0), adapter, optimizer.init(adapter))]
    rng = np.random.default_rng(1)
    shape = (1, ROWS, LENGTH)
    batch = {
        "tokens": rng.integers(0, config.vocab_size, shape).astype(np.int32),
        "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), shape),
        "segment_ids": np.ones(shape, np.int32),
        "answer_index": np.broadcast_to(
            np.arange(LENGTH - ANSWERS, LENGTH, dtype=np.int32), (1, ROWS, ANSWERS)
        ),
        "targets": rng.integers(0, config.vocab_size, (1, ROWS, ANSWERS)).astype(np.int32),
        "weights": np.ones((1, ROWS, ANSWERS), np.float32),
    }
    train = jax.jit(functools.partial(step.train_step, partition, optimizer, 0), donate_argnums=0)

    def run():
        state[0], metrics = train(state[0], frozen, batch)
        jax.block_until_ready(metrics)

    return run


def make_decoding(partition, frozen, config: ModelConfig, mesh):
    scheduler = Scheduler(
        partition,
        mesh,
        batch=PROMPTS,
        max_new_tokens=NEW_TOKENS,
        stops=(),
        context=config.max_position_embeddings,
    )
    adapter = lora.init(partition.trainable, frozen, 0)
    rng = np.random.default_rng(2)
    prompts = rng.integers(0, config.vocab_size, (PROMPTS, PROMPT_LENGTH)).tolist()
    return lambda: scheduler(adapter, frozen, prompts)


if __name__ == "__main__":
    app.run(main)
