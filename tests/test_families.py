"""Families of models, each from its `config.json` alone; no key of that file is ignored unseen.

The dictionaries are the published files of the models, in the spelling that they were published
in (transformers 4); what transformers 5 makes of them is the other spelling.
"""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding

from radonc_jax.models import huggingface, lora
from radonc_jax.models.decoder import rope_frequencies
from tests import checkpoints

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "model_type": "llama",
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
}
LLAMA2 = LLAMA | {"max_position_embeddings": 4096, "pretraining_tp": 1, "vocab_size": 32000}
LLAMA3 = LLAMA | {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0.dev0",
    "vocab_size": 128256,
}
LLAMA31 = LLAMA3 | {
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "transformers_version": "4.43.0.dev0",
}
LLAMA32 = LLAMA31 | {
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "rope_scaling": LLAMA31["rope_scaling"] | {"factor": 32.0},
    "tie_word_embeddings": True,
    "transformers_version": "4.45.0.dev0",
}
MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
MISTRAL2 = MISTRAL | {"attention_dropout": 0.0, "rope_theta": 1000000.0, "sliding_window": None}
# {name: (config.json, number of parameters)}
PUBLISHED = {
    "Llama-2-7b": (
        LLAMA2
        | {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
        },
        6_738_415_616,
    ),
    "Llama-2-13b": (
        LLAMA2
        | {
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_attention_heads": 40,
            "num_hidden_layers": 40,
            "num_key_value_heads": 40,
        },
        13_015_864_320,
    ),
    "Llama-2-70b": (
        LLAMA2
        | {
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_attention_heads": 64,
            "num_hidden_layers": 80,
            "num_key_value_heads": 8,
        },
        68_976_648_192,
    ),
    "Meta-Llama-3-8B": (LLAMA3, 8_030_261_248),
    "Llama-3.1-8B": (LLAMA31, 8_030_261_248),
    "Llama-3.2-1B": (LLAMA32, 1_235_814_400),
    "Llama-3.2-3B": (
        LLAMA32
        | {
            "head_dim": 128,
            "hidden_size": 3072,
            "num_attention_heads": 24,
            "num_hidden_layers": 28,
        },
        3_212_749_824,
    ),
    "Mistral-7B-v0.1": (MISTRAL, 7_241_732_096),
    "Mistral-7B-v0.2": (MISTRAL2, 7_241_732_096),
    "Mistral-7B-v0.3": (MISTRAL2 | {"vocab_size": 32768}, 7_248_023_552),
    "Mistral-Nemo": (
        MISTRAL2
        | {
            "head_dim": 128,
            "hidden_size": 5120,
            "max_position_embeddings": 128000,
            "num_hidden_layers": 40,
            "vocab_size": 131072,
        },
        12_247_782_400,
    ),
}


def read(folder, raw):
    (folder / "config.json").write_text(json.dumps(raw))
    return huggingface.read_config(folder)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_gives_the_published_model(tmp_path, name):
    raw, published = PUBLISHED[name]
    ours = read(tmp_path, raw)
    theirs = AutoConfig.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path)  # the new spelling
    assert "rope_theta" not in json.loads((tmp_path / "config.json").read_text())
    assert huggingface.read_config(tmp_path) == ours

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(theirs)
    shapes = lora.partition(ours, None, jnp.float32).trainable
    assert lora.count(shapes) == sum(p.numel() for p in model.parameters()) == published

    rotary = LlamaRotaryEmbedding if theirs.model_type == "llama" else MistralRotaryEmbedding
    expected = rotary(theirs).inv_freq.numpy()
    np.testing.assert_allclose(rope_frequencies(ours), expected, rtol=1e-5)
    assert ours.rms_norm_eps == theirs.rms_norm_eps == 1e-5
    assert ours.sliding_window == (4096 if name == "Mistral-7B-v0.1" else None)
    assert ours.max_position_embeddings == theirs.max_position_embeddings


TINY = {
    "model_type": "llama",
    **{key: value for key, value in checkpoints.SIZES.items()},
}
SCALING = {key: value for key, value in checkpoints.LLAMA3_ROPE.items() if key != "rope_theta"}


@pytest.mark.parametrize(
    ("settings", "same"),
    [
        ({"head_dim": None}, {}),
        ({"num_key_value_heads": None}, {"num_key_value_heads": 4}),
        ({"rope_scaling": None, "rope_parameters": None, "rope_theta": None}, {}),
        ({"rope_scaling": {}}, {"rope_theta": 1e4}),
        ({"rope_scaling": {"type": "default"}, "rope_theta": 7.0}, {"rope_theta": 7.0}),
        ({"rope_parameters": {"rope_theta": 7}}, {"rope_theta": 7.0}),
        ({"rope_parameters": {"rope_theta": 7.0}, "rope_theta": 7}, {"rope_theta": 7.0}),
        ({"rope_parameters": {"partial_rotary_factor": 1.0}}, {}),
        (
            {"rope_parameters": checkpoints.LLAMA3_ROPE},
            {"rope_scaling": SCALING, "rope_theta": 500.0},
        ),
        (
            {"rope_parameters": checkpoints.LLAMA3_ROPE, "rope_scaling": SCALING}
            | {"rope_theta": 500.0},
            {"rope_parameters": checkpoints.LLAMA3_ROPE},
        ),
        (
            {"rope_parameters": SCALING | {"original_max_position_embeddings": None}},
            {"rope_parameters": SCALING | {"original_max_position_embeddings": 64}},
        ),
        # Later generations of transformers may write what is off.
        ({"later": None, "also": False, "and": [], "or": {}, "yet": ""}, {}),
        ({"is_causal": True, "mlp_bias": None, "hidden_act": None}, {}),
    ],
    ids=str,
)
def test_other_ways_to_say_the_same(tmp_path, settings, same):
    assert read(tmp_path, TINY | settings) == read(tmp_path, TINY | same)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head_dim": None, "hidden_size": 34}, "34 does not divide by 4 heads"),
        ({"rope_theta": 5.0, "rope_parameters": {"rope_theta": 7.0}}, "rope_theta is 5.0, but 7"),
        ({"rope_theta": 5.0, "rope_scaling": SCALING | {"rope_theta": 7}}, "5.0, but 7 in rope_sc"),
        ({"rope_scaling": SCALING, "rope_parameters": {"rope_theta": 7.0}}, "contradict"),
        (
            {"rope_scaling": SCALING, "rope_parameters": SCALING | {"factor": 9.0}},
            "contradict",
        ),
        ({"rope_parameters": {"rope_type": "default", "type": "llama3"}}, "two types"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 7.0}}}, "full_attention"),
        ({"rope_parameters": {"rope_type": "default", "factor": 2.0}}, "factor"),
        ({"rope_parameters": SCALING | {"factor": "8"}}, "factor must be a positive number"),
        ({"rope_parameters": SCALING | {"factor": None}}, "needs .*'factor'"),
        ({"rope_parameters": SCALING | {"low_freq_factor": 4.0}}, "must be above low_freq_factor"),
        ({"rope_parameters": SCALING | {"attention_factor": 1.5}}, "attention_factor"),
        ({"rope_parameters": [1]}, "rope_parameters must be a mapping"),
        ({"rope_theta": [1]}, "rope_theta must be a positive number"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": ["llama3"]}}, "rope type"),
        ({"original_max_position_embeddings": 8}, "original_max_position_embeddings=8"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"is_causal": False}, "is_causal=False is not supported"),
        ({"use_qk_norm": True}, "use_qk_norm=True is not supported"),
        ({"first_k_dense_replace": 0}, "first_k_dense_replace=0 is not supported"),
        ({"auto_map": {"AutoModel": "own.Model"}}, "auto_map"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
    ],
    ids=str,
)
def test_what_is_not_carried_out_is_named(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, TINY | settings)


# A value for each key that differs from that of the checkpoints below.
PERTURBED = {
    "_attn_implementation_autoset": True,
    "architectures": ["OtherForSequenceClassification"],
    "attention_bias": True,
    "attention_dropout": 0.1,
    "attn_implementation": "eager",
    "bad_words_ids": [[3]],
    "begin_suppress_tokens": [3],
    "chunk_size_feed_forward": 1,
    "do_sample": True,
    "dtype": "bfloat16",
    "early_stopping": True,
    "exponential_decay_length_penalty": [3, 1.5],
    "gradient_checkpointing": True,
    "head_dim": 10,
    "hidden_act": "gelu",
    "hidden_size": 36,
    "id2label": {"0": "yes", "1": "no", "2": "other"},
    "initializer_range": 0.5,
    "intermediate_size": 50,
    "is_causal": False,
    "is_decoder": True,
    "is_encoder_decoder": True,
    "label2id": {"yes": 0, "no": 1, "other": 2},
    "max_position_embeddings": 16,
    "mlp_bias": True,
    "model_type": "qwen2",
    "num_attention_heads": 8,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_scores": True,
    "partial_rotary_factor": 0.5,
    "problem_type": "regression",
    "remove_invalid_values": True,
    "return_dict": False,
    "return_dict_in_generate": True,
    "rms_norm_eps": 1e-1,
    "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    "rope_theta": 50.0,
    "sliding_window": 3,
    "suppress_tokens": [3],
    "task_specific_params": {"other": {"top_k": 3}},
    "temperature": 0.5,
    "tie_encoder_decoder": True,
    "torch_dtype": "bfloat16",
    "torchscript": True,
    "typical_p": 0.5,
    "use_bfloat16": True,
    "use_cache": False,
    "vocab_size": 98,
}
NAMES = ("_commit_hash", "_name_or_path", "name_or_path", "transformers_version")
NAMES += ("finetuning_task", "prefix", "tokenizer_class")
# Refused although transformers' forward pass in evaluation does not look at them: they change
# training, say that the file is of another kind of model, or (the context) are a limit. A family
# also ignores what the other one has.
STRICTER = {"architectures", "attention_dropout", "is_encoder_decoder", "max_position_embeddings"}
OF_THE_OTHER = {
    "llama3_scaled_tied": {"sliding_window"},
    "mistral_window": {"attention_bias", "mlp_bias", "partial_rotary_factor"},
}


def perturbed(key):
    return "other" if key in NAMES else PERTURBED.get(key, 3)


def reference(folder, tokens):
    """transformers' logits of a folder, or None where it refuses it or finds no tensors for it."""
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        with torch.no_grad():
            logits = model.eval()(torch.from_numpy(tokens))[0].numpy()
    except Exception:  # of whatever kind: another library's
        return None
    return None if report["missing_keys"] or report["mismatched_keys"] else logits


@pytest.mark.parametrize("variant", OF_THE_OTHER)
def test_each_key_of_config_json_changes_the_logits_or_is_an_error_or_is_inert(tmp_path, variant):
    """Every key that transformers writes, and every one that this code calls inert.

    Inert is what transformers ignores, no more and no less: its own logits stay as they are.
    """
    config = checkpoints.write(tmp_path, variant).config
    path = tmp_path / "config.json"
    written = json.loads(path.read_text())
    tokens = checkpoints.tokens(1, 20)
    architecture = huggingface.read_config(tmp_path)
    before = checkpoints.logits(checkpoints.model(tmp_path), tokens)
    theirs_before = reference(tmp_path, tokens)

    def ignored_by_transformers(raw) -> bool:
        path.write_text(json.dumps(raw))
        theirs = reference(tmp_path, tokens)
        same = theirs is not None and theirs.shape == theirs_before.shape
        return same and np.allclose(theirs, theirs_before, atol=1e-5, rtol=0)

    inert = {key: perturbed(key) for key in huggingface.INERT}
    if not ignored_by_transformers(written | inert):
        one = {key for key in inert if not ignored_by_transformers({**written, key: inert[key]})}
        raise AssertionError(f"transformers does not ignore {one or 'all of them together'}")
    for key in inert:
        assert read(tmp_path, {**written, key: inert[key]}) == architecture, key

    default = json.loads(type(config)().to_json_string(use_diff=False))
    keys = set(written) | set(default) | huggingface.READ | set(huggingface.REQUIRED)
    assert keys >= {"rope_theta", "rope_scaling"}
    stricter = set()
    for key in sorted(keys - huggingface.INERT):
        raw = {**written, key: perturbed(key)}
        assert raw != written, f"{key} must be given another value"
        if key in ("rope_scaling", "rope_theta"):
            # The old spelling alone.
            rope = dict(written["rope_parameters"])
            old = {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
            raw = written | old | {"rope_parameters": None, key: perturbed(key)}
        if ignored_by_transformers(raw):
            stricter.add(key)
        path.write_text(json.dumps(raw))
        assert changes(tmp_path, tokens, before), f"{key} is not read"
    assert stricter == STRICTER | OF_THE_OTHER[variant]


def changes(folder, tokens, before) -> bool:
    """Whether a folder is refused, or gives other logits than before."""
    try:
        decoder = checkpoints.model(folder)
        decoder.init_cache(1, tokens.shape[1])
    except ValueError:
        return True
    after = checkpoints.logits(decoder, tokens)
    return after.shape != before.shape or np.abs(after - before).max() > 1e-3


def test_each_key_of_the_rope_settings_changes_the_logits_or_is_an_error(tmp_path):
    checkpoints.write(tmp_path, "llama3_scaled_tied")
    path = tmp_path / "config.json"
    written = json.loads(path.read_text())
    rope = written.pop("rope_parameters")
    assert set(rope) == set(checkpoints.LLAMA3_ROPE)
    tokens = checkpoints.tokens(1, 20)
    before = checkpoints.logits(checkpoints.model(tmp_path), tokens)
    for key, value in rope.items():
        other = rope | {key: "default" if key == "rope_type" else 3 * value}
        path.write_text(json.dumps(written | {"rope_parameters": other}))
        assert changes(tmp_path, tokens, before), f"{key} is not read"
        # transformers agrees on what it means, and the old spelling says the same.
        if key == "rope_type":
            continue
        theirs = reference(tmp_path, tokens)
        ours = checkpoints.logits(checkpoints.model(tmp_path), tokens)
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
        new = huggingface.read_config(tmp_path)
        theta = other.pop("rope_theta")
        old = written | {"rope_theta": theta, "rope_scaling": other}
        assert read(tmp_path, old) == new
