"""Run by test_decoding.py in a process of its own, which compiles as users do: which answers of a
wide model are not, bit for bit, those of the case alone. Prints {kind of model: how many}."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from radonc_jax.decoding.constrain import build_trie
from radonc_jax.decoding.scheduler import Scheduler
from radonc_jax.models import lora
from radonc_jax.models.decoder import ModelConfig
from radonc_jax.parallel import MeshConfig, make_mesh

# Rows are so wide that prefills of two rows are as exact as those of many.
WIDE = dict(
    vocab_size=96, num_layers=1, hidden_size=2048, num_heads=32, num_kv_heads=8, head_dim=64,
    intermediate_size=1024, rms_norm_eps=1e-5, rope_theta=5000.0, rope_scaling=None,
    sliding_window=40, max_position_embeddings=512,
)  # fmt: skip
EOS, NEW = 2, 8
TARGETS = ("q_proj", "v_proj", "down_proj")
KINDS = {
    "adapter of rank 8": (False, lora.LoRAConfig(8, 16.0, 0.0, TARGETS, False, False), None),
    "DoRA, tied head": (True, lora.LoRAConfig(4, 8.0, 0.0, TARGETS, False, True), None),
    "nf4 with an adapter": (False, lora.LoRAConfig(16, 16.0, 0.0, TARGETS, False, False), "nf4"),
}


def draw(shapes, rng):
    def one(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.asarray(rng.integers(0, 256, leaf.shape), leaf.dtype)
        return jnp.asarray(0.05 * rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree.map(one, shapes)


def differing(tied, adapter, quantized) -> int:
    rng = np.random.default_rng(0)
    config = ModelConfig(**WIDE, tie_word_embeddings=tied)
    partition = lora.partition(config, adapter, jnp.float32, quantized)
    arrays = draw(partition.trainable, rng), draw(partition.frozen, rng)
    scheduler = Scheduler(
        partition,
        make_mesh(MeshConfig(1, 1, 1), devices=jax.devices()[:1]),
        batch=16,
        max_new_tokens=NEW,
        stops=(EOS,),
        context=512,
    )
    assert scheduler._fewest == 2
    prefix = rng.integers(3, 96, 50).tolist()
    lengths = np.r_[rng.integers(1, 40, 30), rng.integers(100, 200, 4)]
    prompts = [prefix + rng.integers(3, 96, length).tolist() for length in lengths]
    prompts += [rng.integers(3, 96, length).tolist() for length in (1, 9, 30)]
    rows = {group[2] for group in scheduler._groups(prompts, prefix)}
    assert len(rows) > 2, rows
    words = {tuple(rng.integers(3, 96, 4).tolist()) for _ in range(300)}
    trie = build_trie([(*word, EOS) for word in words])
    count = 0
    for options in ({}, {"trie": trie}):

        def run(prompts, options=options):
            return scheduler(*arrays, prompts, prefix=prefix, **options)

        together = run(prompts)
        assert len({tuple(answer.tokens) for answer in together}) > 20
        count += sum(a != b for a, b in zip(run(prompts[::-1])[::-1], together, strict=True))
        for number in (0, 7, 15, 31, 34, 36):
            count += run([prompts[number]]) != [together[number]]
    labels = [(5, EOS), (6, 7, EOS), (8, 9, 10, EOS)]

    def score(prompts):
        scored = dict(scheduler.score(*arrays, prompts, labels, prefix=prefix))
        return [scored[number] for number in range(len(prompts))]

    together = score(prompts)
    for number in (0, 7, 15, 31, 34, 36):
        count += score([prompts[number]]) != [together[number]]
    return count


if __name__ == "__main__":
    print(json.dumps({name: differing(*kind) for name, kind in KINDS.items()}))
