"""`radonc_jax.load`: logits and answers of a folder, with and without an adapter."""

import subprocess
import sys

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from tokenizers import Tokenizer, decoders, models

import radonc_jax
from radonc_jax.decoding.greedy import Generation
from radonc_jax.models import lora
from radonc_jax.models.decoder import Decoder, ModelConfig
from radonc_jax.models.peft import save_adapter

# Threads that wait for each other cost more than such tiny products.
torch.set_num_threads(1)

UNKNOWN, BOS, EOS = 0, 1, 2
LETTERS = "\n " + "".join(chr(code) for code in range(33, 125))
PROMPTS = ["Carcinoma of the left breast", "Prostate", "C61?\n", "<s>Glioma</s>"]


def write_tokenizer(folder):
    """One token per character, ids 3 and up; fills the vocabulary of `checkpoints`."""
    vocabulary = {"<unk>": UNKNOWN, "<s>": BOS, "</s>": EOS}
    vocabulary |= {letter: len(vocabulary) + i for i, letter in enumerate(LETTERS)}
    assert len(vocabulary) == checkpoints.SIZES["vocab_size"]
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}'
    )


def write_model(folder):
    """A Hugging Face folder with a tokenizer, and transformers' model of it."""
    folder.mkdir()
    model = checkpoints.write(
        folder, "mistral_window", max_position_embeddings=512, sliding_window=200
    )
    write_tokenizer(folder)
    return model


def write_peft(folder, partition, base):
    """A PEFT folder with an adapter that changes something."""
    config = lora.LoRAConfig(4, 8.0, 0.0, ("q_proj", "down_proj"), False, False)
    adapter = lora.init(partition(config).trainable, None, seed=3)
    save_adapter(folder, jax.tree.map(lambda leaf: leaf + 0.1, adapter), config, str(base))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("notebook") / "base"


@pytest.fixture(scope="module")
def reference(folder):
    return write_model(folder)


@pytest.fixture(scope="module")
def lm(folder, reference):
    return radonc_jax.load(str(folder), dtype="float32")


@pytest.fixture(scope="module")
def peft_folder(folder, lm):
    target = folder.parent / "peft"
    write_peft(target, lambda config: lora.partition(lm.config, config, jnp.float32), folder)
    return target


def transformers_tokens(model, prompt, max_new_tokens, stops):
    tokens = torch.tensor([prompt])
    output = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=list(stops) or [-1],
        pad_token_id=UNKNOWN,
    )[0, len(prompt) :].tolist()
    return output[:-1] if output[-1] in stops else output


def test_logits_equal_those_of_transformers(lm, reference):
    tokens = checkpoints.tokens(batch=3, length=21)
    logits = lm.logits(tokens)
    assert logits.shape == (3, 21, 97) and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, checkpoints.reference_logits(reference, tokens), atol=1e-4)
    np.testing.assert_array_equal(lm.logits(tokens.tolist()), logits)


def test_generate_tokens_equals_transformers(lm, reference):
    prompts = [checkpoints.tokens(1, length, seed=length)[0].tolist() for length in (1, 9, 30)]
    free = [transformers_tokens(reference, prompt, 8, ()) for prompt in prompts]
    stops = (free[0][3], free[1][5])
    for eos in (stops, stops[0]):
        ids = stops if eos is stops else stops[:1]
        expected = [transformers_tokens(reference, prompt, 8, ids) for prompt in prompts]
        assert lm.generate_tokens(prompts, 8, eos=eos) == expected != free
    # Without ids given, the tokenizer's end of sequence ends an answer.
    expected = [transformers_tokens(reference, prompt, 8, (EOS,)) for prompt in prompts]
    assert lm.generate_tokens(prompts, 8) == expected


def test_generate_encodes_with_one_bos_and_decodes(lm):
    generations = lm.generate(PROMPTS, max_new_tokens=8)
    letter = {text: number for number, text in enumerate(LETTERS, 3)}
    # A special token spelt out in a text is text.
    encoded = [[BOS, *(letter[character] for character in prompt)] for prompt in PROMPTS]
    tokens = lm.generate_tokens(encoded, 8)
    assert [generation.tokens for generation in generations] == tokens
    for generation in generations:
        assert isinstance(generation, Generation)
        shown = [LETTERS[token - 3] for token in generation.tokens if token > EOS]
        assert generation.text == "".join(shown).strip()
        assert generation.logprob < 0
        assert generation.finished == (len(generation.tokens) < 8)


def test_attributes(lm):
    assert isinstance(lm.config, ModelConfig) and lm.config.sliding_window == 200
    assert lm.tokenizer.eos_token_id == EOS
    assert isinstance(lm.model, Decoder) and isinstance(lm.model, nnx.Module)
    # The module is a view of the weights, not a second copy of them.
    assert lm.model.lm_head.kernel[...] is lm.model.lm_head.kernel[...]


def test_bfloat16_is_the_default(folder, lm):
    small = radonc_jax.load(str(folder))
    assert {str(x.dtype) for x in jax.tree.leaves(nnx.state(small.model))} == {"bfloat16"}
    tokens = checkpoints.tokens(batch=1, length=5)
    logits = small.logits(tokens)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, lm.logits(tokens), atol=0.5)
    assert not np.allclose(logits, lm.logits(tokens), atol=1e-4)


def test_adapter_from_a_peft_folder(folder, lm, peft_folder):
    tuned = radonc_jax.load(str(folder), adapter=str(peft_folder), dtype="float32")
    base = checkpoints.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    reference = peft.PeftModel.from_pretrained(base, peft_folder).eval()
    tokens = checkpoints.tokens(batch=2, length=12)
    expected = checkpoints.reference_logits(reference, tokens)
    np.testing.assert_allclose(tuned.logits(tokens), expected, atol=1e-4)
    assert not np.allclose(lm.logits(tokens), expected, atol=1e-2)
    prompt = tokens[0].tolist()
    expected = transformers_tokens(reference, prompt, 6, (EOS,))
    assert tuned.generate_tokens([prompt], 6) == [expected]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda lm: lm.logits([1, 2]), r"\[B, T\]"),
        (lambda lm: lm.logits([[1.5]]), "integers"),
        (lambda lm: lm.logits([[97]]), "0 to 96"),
        (lambda lm: lm.logits([[-1]]), "0 to 96"),
        (lambda lm: lm.logits([[1] * 513]), "513 tokens .* context of 512"),
        (lambda lm: lm.generate("one text"), "list of strings"),
        (lambda lm: lm.generate(["x" * 500]), "1 of 1 prompts are too long"),
        (lambda lm: lm.generate_tokens([[5], []], 4), "1 of 2 prompts are empty"),
        (lambda lm: lm.generate_tokens([[5], [97]], 4), "0 to 96"),
        (lambda lm: lm.generate_tokens([[5]], 0), "at least 1"),
    ],
)
def test_bad_arguments(lm, call, message):
    with pytest.raises(ValueError, match=message):
        call(lm)


def test_a_quantised_model_answers(folder, lm, peft_folder):
    quantised = radonc_jax.load(
        str(folder), adapter=str(peft_folder), dtype="float32", quantize="int8"
    )
    tokens = [[5, 6, 7, 8]]
    close = radonc_jax.load(str(folder), adapter=str(peft_folder), dtype="float32").logits(tokens)
    difference = np.abs(quantised.logits(tokens) - close).max()
    assert 0 < difference < 0.1 * np.abs(close).max()
    assert len(quantised.generate(PROMPTS, 4)) == len(PROMPTS)


def test_load_refuses(folder, reference, tmp_path):
    with pytest.raises(ValueError, match="int8 or nf4, not 'fp4'"):
        radonc_jax.load(str(folder), quantize="fp4")
    with pytest.raises(ValueError, match="bfloat16 or float32"):
        radonc_jax.load(str(folder), dtype="float16")
    with pytest.raises(FileNotFoundError, match="not a folder here"):
        radonc_jax.load(str(tmp_path / "nowhere"))


def test_importing_the_package_does_not_load_jax():
    program = "import sys, radonc_jax; sys.exit('jax' in sys.modules or 'flax' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
