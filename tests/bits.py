"""Run by test_decoding.py in a process of its own, which compiles as users do: which answers of a
wide model are not, bit for bit, those of the case alone. Prints {kind of model: how many}."""

import json
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from radonc_jax.decoding import scheduler as scheduling
from radonc_jax.decoding.constrain import build_trie
from radonc_jax.decoding.scheduler import Scheduler
from radonc_jax.models import lora
from radonc_jax.models.decoder import ModelConfig
from radonc_jax.parallel import MeshConfig, make_mesh

# Rows are so wide that prefills of two rows are as exact as those of many.
WIDE = dict(
    vocab_size=96, num_layers=1, hidden_size=2048, num_heads=32, num_kv_heads=8, head_dim=64,
    intermediate_size=1024, rms_norm_eps=1e-5, rope_theta=5000.0, rope_scaling=None,
    sliding_window=40, max_position_embeddings=256,
)  # fmt: skip
EOS, NEW = 2, 6
ALONE = (0, 9, 21)
WIDTHS = (3, 22)  # of the prefill of a short prompt, as they are where prompts are short
TARGETS = ("q_proj", "v_proj", "down_proj")
KINDS = {
    "adapter of rank 8": (False, lora.LoRAConfig(8, 16.0, 0.0, TARGETS, False, False), None),
    "DoRA, tied head, a trie": (True, lora.LoRAConfig(4, 8.0, 0.0, TARGETS, False, True), None),
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
        batch=8,
        max_new_tokens=NEW,
        stops=(EOS,),
        context=256,
    )
    assert scheduler._fewest == 2
    prefix = rng.integers(3, 96, 50).tolist()
    lengths = (90, 84, 50, *rng.integers(1, 17, 17))
    prompts = [prefix + rng.integers(3, 96, length).tolist() for length in lengths]
    prompts += [rng.integers(3, 96, length).tolist() for length in (1, 16)]
    rows = {group[2] for group in scheduler._groups(prompts, prefix)}
    assert rows == {2, 8}, rows
    trie = None
    if tied:
        words = {tuple(rng.integers(3, 96, 4).tolist()) for _ in range(300)}
        trie = build_trie([(*word, EOS) for word in words])

    def run(prompts):
        return scheduler(*arrays, prompts, prefix=prefix, trie=trie)

    together = run(prompts)
    assert len({tuple(answer.tokens) for answer in together}) > 10
    count = sum(a != b for a, b in zip(run(prompts[::-1])[::-1], together, strict=True))
    for number in ALONE:
        count += run([prompts[number]]) != [together[number]]
    for width in WIDTHS:
        planned = mock.Mock(side_effect=[[], [(8, width)]])  # it does not begin with the prefix
        with mock.patch.object(scheduling, "plan", planned):
            count += run([prompts[-2]]) != [together[-2]]
        assert planned.call_count == 2
    if quantized:
        return count
    labels = [(5, EOS), (6, 7, EOS), (8, 9, 10, EOS)]

    def score(prompts):
        scored = dict(scheduler.score(*arrays, prompts, labels, prefix=prefix))
        return [scored[number] for number in range(len(prompts))]

    together = score(prompts)
    for number in ALONE:
        count += score([prompts[number]]) != [together[number]]
    return count


if __name__ == "__main__":
    print(json.dumps({name: differing(*kind) for name, kind in KINDS.items()}))
