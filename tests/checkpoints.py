"""Random tiny checkpoints, written by transformers, for the tests of models and adapters."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from radonc_jax import parallel
from radonc_jax.models import huggingface, lora, weight_files

SIZES = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-3,
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS = {
    "llama2": (LlamaConfig, {}),
    # LLaMA 2 70B; with its theta, which is not the default, Llama 3 too.
    "llama2_grouped": (LlamaConfig, {"rope_parameters": {"rope_theta": 777.0}}),
    "llama2_multi_query": (LlamaConfig, {"num_key_value_heads": 1}),
    "llama3_scaled": (LlamaConfig, {"rope_parameters": LLAMA3_ROPE}),
    "llama3_scaled_tied": (
        LlamaConfig,
        {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True, "head_dim": 16},
    ),
    "mistral_window": (MistralConfig, {"sliding_window": 5}),
    "mistral_no_window": (
        MistralConfig,
        {"sliding_window": None, "rope_parameters": {"rope_theta": 1e6}},
    ),
    "mistral_nemo": (MistralConfig, {"sliding_window": None, "head_dim": 12}),
}


def write(folder: Path, variant: str, *, seed=0, dtype=torch.float32, shard=None, **changes):
    """Saves a random model of the variant into `folder` and returns it, in evaluation mode.

    Weights are drawn wide (0.1 to 0.3) and norms away from one, so that each of them matters.
    """
    kind, settings = VARIANTS[variant]
    torch.manual_seed(seed)
    config = kind(**{**SIZES, **settings, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.2)
    model = model.to(dtype).eval()
    model.save_pretrained(folder, **({} if shard is None else {"max_shard_size": shard}))
    return model


def load(folder: Path, adapter: lora.LoRAConfig | None = None, dtype="float32", devices=1):
    """(config, partition, weights): the folder read by radonc_jax."""
    config = huggingface.read_config(folder)
    kind = huggingface.as_dtype(dtype)
    partition = lora.partition(config, adapter, kind)
    wanted = partition.trainable if adapter is None else partition.frozen
    mesh = parallel.make_mesh(parallel.MeshConfig(-1, 1, 1), jax.devices()[:devices])
    weights = weight_files.load_weights(
        folder, wanted, parallel.shardings(wanted, mesh), kind, config.num_layers
    )
    return config, partition, weights


def model(folder: Path, dtype="float32"):
    """The decoder of a folder."""
    _, partition, weights = load(folder, dtype=dtype)
    return partition.merge(weights, partition.frozen)


def tokens(batch=2, length=19, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, SIZES["vocab_size"], (batch, length))


def positions(tokens: np.ndarray) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)


# Tiny models run for milliseconds and compile for seconds: the tests ask for little optimisation.
FAST_COMPILE = {"xla_backend_optimization_level": 0}


def logits(decoder, tokens) -> np.ndarray:
    """Float32 logits [B, T, V] of whole rows."""
    return np.asarray(forward(decoder, jnp.asarray(tokens), positions(tokens))[0])


def forward(decoder, tokens, positions, segment_ids=None, cache=None):
    """(logits, cache) of any call."""
    return _forward(*nnx.split(decoder), tokens, positions, segment_ids, cache)


@partial(jax.jit, static_argnums=0, compiler_options=FAST_COMPILE)
def _forward(graph, state, tokens, positions, segment_ids, cache):
    decoder = nnx.merge(graph, state)
    hidden, cache = decoder(tokens, positions, segment_ids, cache)
    return decoder.logits(hidden), cache


def reference_logits(model, tokens) -> np.ndarray:
    """The same of a transformers or peft model."""
    with torch.no_grad():
        return model(torch.from_numpy(np.asarray(tokens))).logits.float().numpy()
