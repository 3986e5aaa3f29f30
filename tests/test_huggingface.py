"""Checkpoint folders that are damaged, foreign or incomplete; hub ids; tokenizers."""

import contextlib
import io
import json
import os
import random
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.numpy import load_file, save_file

from radonc_jax import loading, parallel
from radonc_jax.models import hub, huggingface, lora, weight_files
from radonc_jax.models.tokenizer import load_tokenizer
from tests import checkpoints

NAME = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("written")
    checkpoints.write(path / "one", "llama2_grouped")
    checkpoints.write(path / "many", "llama2_grouped", shard="30KB")
    return path


@pytest.fixture
def one(written, tmp_path):
    return shutil.copytree(written / "one", tmp_path / "one")


@pytest.fixture
def many(written, tmp_path):
    return shutil.copytree(written / "many", tmp_path / "many")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop(NAME), f"missing tensor {NAME}"),
        (lambda t: t.update(extra=np.zeros(1, np.float32)), "unexpected tensor extra"),
        (lambda t: t.update({NAME: t[NAME].T.copy()}), rf"{NAME} has shape \(32, 16\).*\(16, 32\)"),
        (lambda t: t.update({NAME: t[NAME].astype(np.int32)}), f"{NAME} has dtype I32"),
    ],
)
def test_a_misfitting_tensor_is_named(one, damage, message):
    path = one / hub.WEIGHTS
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=message):
        checkpoints.load(one)


def test_many_misfits_are_one_error(one):
    path = one / hub.WEIGHTS
    save_file({"a": np.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"missing tensor .*; and 23 more"):
        checkpoints.load(one)


@pytest.mark.parametrize("keep", [0, 4, 100, -100])
def test_a_truncated_file(one, keep):
    path = one / hub.WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="model.safetensors is damaged or cut short"):
        checkpoints.load(one)


def test_rotary_frequencies_of_old_exports_are_ignored(one):
    path = one / hub.WEIGHTS
    before = checkpoints.load(one)[2]
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32)}
    save_file({**load_file(path), **extra}, path)
    jax.tree.map(np.testing.assert_array_equal, checkpoints.load(one)[2], before)


def test_a_shard_that_the_index_names_is_missing(many):
    file = weight_files.file_paths(many)[2]
    file.unlink()
    with pytest.raises(FileNotFoundError, match=file.name):
        checkpoints.load(many)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"weight_map": {', "not valid JSON"),
        ("[]", "JSON object"),
        ("{}", "weight_map"),
        ('{"weight_map": {"a": 1}}', "not a file name"),
        ('{"weight_map": {"a": "../../x.safetensors"}}', "not a file name"),
    ],
)
def test_a_damaged_index(many, content, message):
    (many / hub.INDEX).write_text(content)
    with pytest.raises(ValueError, match=message):
        checkpoints.load(many)


def test_an_index_that_points_to_the_wrong_shard(many):
    index = json.loads((many / hub.INDEX).read_text())
    first, second = sorted(set(index["weight_map"].values()))[:2]
    name = next(n for n, file in index["weight_map"].items() if file == first)
    index["weight_map"][name] = second
    (many / hub.INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"{name} into {second}, which does not hold it"):
        checkpoints.load(many)


def test_a_tensor_in_two_shards_is_named(many):
    first, second = weight_files.file_paths(many)[:2]
    name = next(iter(load_file(first)))
    save_file({**load_file(second), name: load_file(first)[name] + 1}, second)
    with pytest.raises(ValueError, match=f"unexpected tensor {name} in {second.name}"):
        checkpoints.load(many)


def test_a_tied_head_that_only_the_index_knows_is_named(tmp_path):
    checkpoints.write(tmp_path, "llama3_scaled_tied", shard="30KB")
    index = json.loads((tmp_path / hub.INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = next(iter(index["weight_map"].values()))
    (tmp_path / hub.INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="lm_head.weight into .*, which does not hold it"):
        checkpoints.load(tmp_path)


def test_columns_of_other_devices_are_left_out(tmp_path):
    """A cut along the columns is read from the mapped file, in blocks of a few rows."""
    checkpoints.write(tmp_path, "llama2", hidden_size=64, num_attention_heads=4, vocab_size=98)
    one = checkpoints.load(tmp_path)[2]
    config = huggingface.read_config(tmp_path)
    partition = lora.partition(config, None, np.dtype("float32"))
    mesh = parallel.make_mesh(parallel.MeshConfig(1, 4, 2))
    placements = parallel.shardings(partition.trainable, mesh)
    cut = weight_files.load_weights(
        tmp_path, partition.trainable, placements, np.dtype("float32"), config.num_layers
    )
    jax.tree.map(np.testing.assert_array_equal, cut, one)


def test_blocks_of_any_size_make_the_same_arrays(one, monkeypatch):
    whole = checkpoints.load(one, dtype="bfloat16")[2]
    for size in (1, 100, 1000):
        monkeypatch.setattr(weight_files, "BLOCK_BYTES", size)
        jax.tree.map(
            np.testing.assert_array_equal, checkpoints.load(one, dtype="bfloat16")[2], whole
        )


def test_pickled_weights_are_not_read(one):
    torch.save({}, one / "pytorch_model.bin")
    (one / hub.WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match="Pickled weights are not read: convert"):
        checkpoints.load(one)


def test_a_tied_head_that_differs_is_refused(tmp_path):
    checkpoints.write(tmp_path, "llama3_scaled_tied")
    path = tmp_path / hub.WEIGHTS
    tensors = load_file(path)
    head = tensors[weight_files.EMBEDDING].copy()
    save_file({**tensors, "lm_head.weight": head}, path)
    checkpoints.load(tmp_path)
    head[-1, -1] += 1
    save_file({**tensors, "lm_head.weight": head}, path)
    with pytest.raises(ValueError, match="lm_head.weight and model.embed_tokens.weight differ"):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2"}, "qwen2"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "mixtral"),
        ({"model_type": None}, "model_type"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"sliding_window": 8}, "sliding_window"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_scaling": {"type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"rope_parameters": {"rope_theta": "big"}}, "rope_theta"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"vocab_size": None}, "vocab_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 7}, "head_dim"),
    ],
)
def test_an_unsupported_config_is_named(one, change, message):
    path = one / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        huggingface.read_config(one)


def test_a_missing_or_damaged_config(one):
    (one / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        huggingface.read_config(one)
    (one / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="is .* a Hugging Face model folder"):
        huggingface.read_config(one)


def test_absent_keys_mean_what_they_mean_in_transformers(tmp_path):
    from transformers import AutoConfig

    sizes = {key: checkpoints.SIZES[key] for key in checkpoints.SIZES if "key_value" not in key}
    sizes |= {"num_attention_heads": 16}
    for family in ("llama", "mistral"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **sizes}))
        ours, theirs = huggingface.read_config(tmp_path), AutoConfig.from_pretrained(tmp_path)
        assert ours.num_kv_heads == theirs.num_key_value_heads
        assert ours.head_dim == theirs.head_dim
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
        assert ours.sliding_window == getattr(theirs, "sliding_window", None)
        assert ours.tie_word_embeddings == theirs.tie_word_embeddings


def test_a_folder_touches_no_network(one, monkeypatch):
    write_sentencepiece(one)

    def refuse(*arguments):
        raise AssertionError(f"network: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    folder = huggingface.resolve(str(one))
    checkpoints.load(folder)
    tokenizer = huggingface.load_tokenizer(folder)
    huggingface.stop_tokens(folder, tokenizer)
    tensors = weight_files.stored_tensors(folder)
    huggingface.save_tensors(one / "out", source=folder, tensors=tensors)


@pytest.mark.parametrize("name", ["nosuchfolder", "/no/such/folder", "./a/b", "a/b/c", "~/none"])
def test_a_path_that_does_not_exist(name):
    with pytest.raises(FileNotFoundError, match="is not a folder here"):
        huggingface.resolve(name)


def test_a_mistyped_path_is_no_hub_id(one, tmp_path, monkeypatch):
    """Beside a folder that is there; a hub id works where none of its owner's name is, and one that
    is in the cache does anyway."""

    class Asked(Exception):
        pass

    def ask(name, local_files_only=False, **options):
        if local_files_only and name == "demo/cached":
            return one
        raise FileNotFoundError(name) if local_files_only else Asked(name)

    monkeypatch.setattr("huggingface_hub.snapshot_download", ask)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_is_reachable", lambda endpoint: True)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(one, tmp_path / "demo" / "base")
    # A run folder has a config.json too, and is no model.
    (tmp_path / "demo" / "bsae_icd").mkdir()
    (tmp_path / "demo" / "bsae_icd" / "config.json").write_text("{}")
    assert huggingface.resolve("demo/cached") == one
    for name, near in (("demo/bsae", "demo/base"), ("./demo/bas", "demo/base"), ("dem/base", "")):
        if not near:
            with pytest.raises(Asked, match=name):
                huggingface.resolve(name)
            continue
        with pytest.raises(FileNotFoundError) as error:
            huggingface.resolve(name)
        told = str(error.value)
        assert told.startswith(f"model {name!r} is not a folder here, in {tmp_path} (did you mean ")
        assert f"(did you mean {near}?)" in told
    with pytest.raises(
        FileNotFoundError, match=r"pinned \(demo/bsae@revision\).*folder 'demo' here"
    ):
        huggingface.resolve("demo/bsae")
    with pytest.raises(Asked, match="demo/bsae"):
        huggingface.resolve("demo/bsae@main")
    # So does the one that a run began with, which has a revision.
    base = {"model": "demo/bsae", "revision": "0" * 40, "folder": "/nowhere/snapshots/0"}
    (tmp_path / "manifest.json").write_text(json.dumps({"base": base}))
    with pytest.raises(Asked, match="demo/bsae"):
        huggingface.resolve("demo/bsae", tmp_path)


def test_a_run_s_relative_base_is_found_from_another_working_directory(one, tmp_path, monkeypatch):
    """By what its manifest tells; where that is gone too, both places are named."""
    shutil.copytree(one, tmp_path / "made" / "base")
    monkeypatch.chdir(tmp_path / "made")
    base = loading.base_origin("base", huggingface.resolve("base"), True, weights=False)
    (tmp_path / "manifest.json").write_text(json.dumps({"base": base}))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert huggingface.resolve("base", tmp_path) == tmp_path / "made" / "base"
    for model, workdir in (("base", None), ("other", tmp_path)):
        with pytest.raises(FileNotFoundError, match=f"in {tmp_path}/elsewhere. Pass"):
            huggingface.resolve(model, workdir)
    shutil.rmtree(tmp_path / "made")
    message = f"in {tmp_path}/elsewhere, nor is {tmp_path}/made/base, where the run had it. Pass"
    with pytest.raises(FileNotFoundError, match=message):
        huggingface.resolve("base", tmp_path)


SCRIPT = """
import sys, time
from huggingface_hub import snapshot_download
from radonc_jax.models import hub
if len(sys.argv) > 2:
    hub._is_reachable = lambda endpoint: sys.exit("asked the network")
start = time.monotonic()
try:
    print(hub.resolve(sys.argv[1], *sys.argv[3:]))
except FileNotFoundError as error:
    print(error, f"[{time.monotonic() - start:.2f} s]", time.monotonic() - start < 1)
"""


def resolve_apart(tmp_path, *arguments, model="mistralai/Mistral-7B-v0.1", **environment) -> str:
    """Another process, because the hub's client reads its environment once."""
    clean = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, model, *map(str, arguments)],
        env={**clean, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", **environment},
        capture_output=True,
        text=True,
        timeout=100,
    )
    return result.stdout + result.stderr


@pytest.mark.parametrize("listens", [False, True])
def test_a_hub_that_cannot_be_reached_is_an_error_within_a_second(tmp_path, listens):
    """A closed port, and one that never accepts because its queue is full."""
    with socket.socket() as server, contextlib.ExitStack() as waiting:
        server.bind(("127.0.0.1", 0))
        if listens:
            server.listen(0)
            for _ in range(4):
                client = waiting.enter_context(socket.socket())
                client.setblocking(False)
                client.connect_ex(server.getsockname())
        said = resolve_apart(tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{server.getsockname()[1]}")
    assert "is not a folder here" in said and "could not be reached" in said
    assert said.strip().endswith("True"), said


def test_a_missing_model_is_told_before_jax_is_imported():
    code = "import sys, radonc_jax.train; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_offline_is_respected_and_a_cached_snapshot_is_not_asked_for_again(tmp_path, written):
    said = resolve_apart(tmp_path, "no network", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in said
    cached = tmp_path / "hub" / "models--mistralai--Mistral-7B-v0.1"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(written / "one", cached / "snapshots" / ("0" * 40))
    said = resolve_apart(tmp_path, "no network")
    assert said.strip() == str(cached / "snapshots" / ("0" * 40))
    assert hub.revision(said.strip()) == "0" * 40

    # Another revision has come since: a run goes on with its own, and any can be asked for.
    shutil.copytree(written / "many", cached / "snapshots" / ("1" * 40))
    (cached / "refs" / "main").write_text("1" * 40)
    assert resolve_apart(tmp_path, "no network").strip().endswith("1" * 40)
    base = {"model": "mistralai/Mistral-7B-v0.1", "revision": "0" * 40}
    (tmp_path / "manifest.json").write_text(json.dumps({"base": base}))
    assert resolve_apart(tmp_path, "no network", tmp_path).strip().endswith("0" * 40)
    pinned = base["model"] + "@" + "0" * 40
    assert resolve_apart(tmp_path, "no network", model=pinned).strip().endswith("0" * 40)


# ---- tokenizers ------------------------------------------------------------------------------


def train_sentencepiece(**settings) -> bytes:
    """A sentencepiece model made as LLaMA's and Mistral's are, but small."""
    words = "right left breast prostate lung stage T1c N0 40.05 Gy in 15 fractions 3DCRT, bone"
    rng = random.Random(0)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(" ".join(rng.choices(words.split(), k=12)) for _ in range(200)),
        model_writer=model,
        **{
            "vocab_size": 380,
            "model_type": "bpe",
            "byte_fallback": True,
            "character_coverage": 1.0,
            "split_digits": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "unk_id": 0,
            "bos_id": 1,
            "eos_id": 2,
            "minloglevel": 2,
            **settings,
        },
    )
    return model.getvalue()


def write_sentencepiece(folder, **settings):
    folder.mkdir(exist_ok=True)
    model = train_sentencepiece(**settings)
    (folder / "tokenizer.model").write_bytes(model)
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def texts() -> list[str]:
    rng = random.Random(1)
    pieces = [
        "right breast",
        "40.05 Gy",
        " ",
        "  ",
        "\n",
        "\t",
        "ä",
        "µ",
        "漢",
        "</s>",
        "<s>",
        "T1c",
    ]
    drawn = ["".join(rng.choices([*pieces, *"abcT0<>/"], k=rng.randint(1, 30))) for _ in range(500)]
    return ["", " lead", "trail ", "  two  spaces", "a</s>b", "\n\nanswer", *drawn]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": True},
        {"user_defined_symbols": ["[X]"], "pad_id": 3, "add_dummy_prefix": False},
    ],
    ids=["llama", "no-prefix", "strips", "symbols"],
)
def test_a_sentencepiece_folder_gives_sentencepiece_ids(tmp_path, settings):
    reference = write_sentencepiece(tmp_path / "model", **settings)
    tokenizer = load_tokenizer(tmp_path / "model")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.pad_token_id == (3 if "pad_id" in settings else None)
    assert len(tokenizer) == 380
    for text in [*texts(), "a [X] b"]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == reference.encode(text), text
        assert tokenizer.decode(ids) == reference.decode(ids)
    if "remove_extra_whitespaces" not in settings:
        for text in texts():
            assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_other_programs_read_the_same_ids_after_an_export(tmp_path, family):
    """copy_tokenizer adds tokenizer.json where only sentencepiece's file was."""
    from transformers import AutoTokenizer

    reference = write_sentencepiece(tmp_path / "in")
    (tmp_path / "out").mkdir()
    huggingface.copy_tokenizer(tmp_path / "in", tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text(json.dumps({"model_type": family}))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = load_tokenizer(tmp_path / "out")
    for text in texts():
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == reference.encode(text), text
        if "<s>" not in text and "</s>" not in text:
            assert theirs.encode(text, add_special_tokens=False) == ids, text


def test_special_tokens_come_from_the_settings(tmp_path):
    write_sentencepiece(tmp_path)
    settings = {"eos_token": {"content": "<0x41>"}, "bos_token": "<s>", "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id) == "<0x41>"
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": 380}))
    assert len(load_tokenizer(tmp_path)) == 381
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": 400}))
    with pytest.raises(ValueError, match="the id 400"):
        load_tokenizer(tmp_path)
    (tmp_path / "added_tokens.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<nowhere>"}))
    with pytest.raises(ValueError, match="<nowhere>"):
        load_tokenizer(tmp_path)


def test_folders_without_a_usable_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither tokenizer.json nor tokenizer.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\xff not a model")
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(
        train_sentencepiece(model_type="unigram", vocab_size=290)
    )
    with pytest.raises(ValueError, match="other than BPE"):
        load_tokenizer(tmp_path)
    write_sentencepiece(tmp_path, user_defined_symbols=["[X]"])
    with pytest.raises(ValueError, match="user-defined symbols with a leading space"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json cannot be read"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    write_sentencepiece(tmp_path, eos_id=-1)
    with pytest.raises(ValueError, match="no EOS token"):
        load_tokenizer(tmp_path)


def test_stop_tokens(tmp_path):
    write_sentencepiece(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert huggingface.stop_tokens(tmp_path, tokenizer) == (2,)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert huggingface.stop_tokens(tmp_path, tokenizer) == (2, 7)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
    assert huggingface.stop_tokens(tmp_path, tokenizer) == (2, 9)
