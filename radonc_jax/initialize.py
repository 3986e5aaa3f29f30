"""Makes a small untrained model as an ordinary Hugging Face folder: tokenizer and random weights.

    python -m radonc_jax.initialize --cohort=demo/cohort --output=demo/start

The demo has no pretrained checkpoint to begin with, so it makes one: this command trains a
sentencepiece tokenizer on plain text (diagnoses of the training split, the code table, the fixed
wording of the prompts) and draws the weights of a small Mistral; `train` with task="text" then
trains all of it. With a real 7B checkpoint neither is needed.
"""

import io
import json
import shutil
from pathlib import Path

import jax
import sentencepiece
from absl import flags
from flax import nnx

from radonc_jax import command, parallel
from radonc_jax.data import cohort
from radonc_jax.models import huggingface
from radonc_jax.models.decoder import Decoder
from radonc_jax.tasks import TASKS, TextTask

_COHORT = flags.DEFINE_string("cohort", None, "Cohort folder, from `prepare`.")
_OUTPUT = flags.DEFINE_string("output", None, "Model folder to be made.")
_VOCAB = flags.DEFINE_integer("vocab_size", 2560, "Pieces of the tokenizer.")
_HIDDEN = flags.DEFINE_integer("hidden_size", 256, "Width of the model.")
_LAYERS = flags.DEFINE_integer("num_layers", 2, "Layers.")
_HEADS = flags.DEFINE_integer("num_heads", 4, "Query heads.")
_KV_HEADS = flags.DEFINE_integer("num_kv_heads", 2, "Key/value heads.")
_MLP = flags.DEFINE_integer("intermediate_size", 704, "Width of the MLP.")
_CONTEXT = flags.DEFINE_integer("context", 512, "Positions of the model.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the random weights.")
flags.mark_flags_as_required(["cohort", "output"])


def main():
    parallel.quiet_third_parties()
    initialize(Path(_OUTPUT.value))


def initialize(output: Path) -> None:
    """Writes the folder; FileExistsError if it is there."""
    if output.exists():
        raise FileExistsError(f"{output} exists: choose another output folder or remove it")
    records = cohort.load_records(_COHORT.value, "train")
    documents = TextTask().documents(records)
    wording = ["".join(task.prompt_parts("")) for task in TASKS.values()]
    aside = output.with_name(output.name + ".source")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    train_tokenizer(documents + wording * max(1, len(documents) // 50), _VOCAB.value, aside)
    write_config(aside)

    config = huggingface.read_config(aside)
    weights = jax.jit(lambda: nnx.state(Decoder(config, rngs=nnx.Rngs(_SEED.value))))()
    leaves = jax.tree_util.tree_leaves_with_path(weights)
    huggingface.save_folder(
        output,
        source=aside,
        weights={parallel.path_name(path): leaf for path, leaf in leaves},
        num_layers=config.num_layers,
    )
    shutil.rmtree(aside)
    print(f"{output}: {sum(leaf.size for _, leaf in leaves):,} random parameters")


def train_tokenizer(texts: list[str], vocab_size: int, folder: Path) -> None:
    """A sentencepiece BPE tokenizer built like LLaMA 2's: digits apart, bytes for the unknown.

    Writes `tokenizer.model` and `tokenizer_config.json` into `folder`.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.splitlines() if line),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,  # a word reads alike at the start of a text and of a line
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer_config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "legacy": False,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")


def write_config(folder: Path) -> None:
    """The `config.json` of a small Mistral, by transformers' own class."""
    from transformers import MistralConfig

    MistralConfig(
        vocab_size=_VOCAB.value,
        hidden_size=_HIDDEN.value,
        num_hidden_layers=_LAYERS.value,
        num_attention_heads=_HEADS.value,
        num_key_value_heads=_KV_HEADS.value,
        head_dim=_HIDDEN.value // _HEADS.value,
        intermediate_size=_MLP.value,
        max_position_embeddings=_CONTEXT.value,
        rms_norm_eps=1e-5,
        sliding_window=None,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        architectures=["MistralForCausalLM"],
    ).save_pretrained(folder)


if __name__ == "__main__":
    command.run(main)
