"""Adapters in PEFT's folders: in and out without drift, and every misfit named."""

import json

import jax
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file

from radonc_jax import parallel
from radonc_jax.models import lora
from radonc_jax.models import peft as folders
from tests import checkpoints


def write_adapter(model, folder, **settings):
    """A random adapter written by peft itself; returns the adapted model."""
    torch.manual_seed(7)
    settings = {"r": 3, "lora_alpha": 5, "lora_dropout": 0.1, **settings}
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model.eval()


def read(base, folder):
    """(config, partition, frozen, adapter) of a base folder and a PEFT folder."""
    config = folders.read_config(folder)
    architecture, partition, frozen = checkpoints.load(base, config)
    mesh = parallel.make_mesh(parallel.MeshConfig(-1, 1, 1), jax.devices()[:1])
    placements = parallel.shardings(partition.trainable, mesh)
    adapter = folders.load_weights(folder, partition.trainable, placements, architecture.num_layers)
    return config, partition, frozen, adapter


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.(mlp\.down|self_attn\.o)_proj", "use_rslora": True},
        {"target_modules": ["self_attn.k_proj", "up_proj"], "use_dora": True},
    ],
    ids=["list", "all-linear", "pattern-rslora", "dora"],
)
def test_peft_to_here_to_peft(tmp_path, settings):
    model = checkpoints.write(tmp_path / "base", "mistral_window")
    theirs = write_adapter(model, tmp_path / "in", **settings)
    config, partition, frozen, adapter = read(tmp_path / "base", tmp_path / "in")
    assert (config.rank, config.alpha, config.dropout) == (3, 5, 0.1)

    tokens = checkpoints.tokens()
    expected = checkpoints.reference_logits(theirs, tokens)
    logits = checkpoints.logits(partition.merge(adapter, frozen), tokens)
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)

    folders.save_adapter(tmp_path / "out", adapter, config, "some/base")
    before, after = (load_file(tmp_path / name / folders.WEIGHTS) for name in ("in", "out"))
    assert set(after) == set(before)
    for name in before:
        assert after[name].tobytes() == before[name].tobytes(), name
    assert folders.read_config(tmp_path / "out") == config
    raw = json.loads((tmp_path / "out" / folders.CONFIG).read_text())
    assert (raw["peft_type"], raw["task_type"]) == ("LORA", "CAUSAL_LM")
    assert raw["base_model_name_or_path"] == "some/base"
    assert raw["lora_dropout"] == 0.1

    base = checkpoints.write(tmp_path / "again", "mistral_window")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    np.testing.assert_array_equal(checkpoints.reference_logits(again, tokens), expected)


def test_an_existing_folder_is_not_overwritten(tmp_path):
    with pytest.raises(FileExistsError, match="exists"):
        folders.save_adapter(tmp_path, {}, None, "base")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("peft")
    model = checkpoints.write(path / "base", "llama2")
    write_adapter(model, path / "adapter", target_modules=["q_proj"])
    return path


@pytest.fixture
def copied(written, tmp_path):
    """A folder to be damaged; the base is shared."""
    for file in (folders.CONFIG, folders.WEIGHTS):
        (tmp_path / file).write_bytes((written / "adapter" / file).read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alpha_pattern", {"q_proj": 7}),
        ("bias", "all"),
        ("fan_in_fan_out", True),
        ("init_lora_weights", "pissa"),
        ("layers_to_transform", [0]),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("peft_type", "IA3"),
        ("rank_pattern", {"q_proj": 7}),
        ("some_later_setting", 3),
        ("target_modules", ["q_proj", "lm_head"]),
        ("target_modules", ".*nothing"),
        ("target_modules", "(unbalanced"),
        ("target_parameters", ["mlp.experts"]),
        ("task_type", "SEQ_CLS"),
        ("trainable_token_indices", [1]),
        ("r", "8"),
        ("r", 0),
    ],
)
def test_an_unsupported_setting_is_named(copied, key, value):
    path = copied / folders.CONFIG
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, key: value}))
    with pytest.raises(ValueError, match="rank" if value == 0 else key):
        folders.read_config(copied)


def test_a_folder_without_an_adapter(tmp_path):
    with pytest.raises(FileNotFoundError, match=folders.CONFIG):
        folders.read_config(tmp_path)
    (tmp_path / folders.CONFIG).write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        folders.read_config(tmp_path)


NAME = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop(NAME), f"missing tensor {NAME}"),
        (lambda t: t.update(extra=np.zeros(1)), "unexpected tensor extra"),
        (lambda t: t.update({NAME: np.zeros((4, 32))}), rf"{NAME} has shape \(4, 32\)"),
    ],
)
def test_a_misfitting_tensor_is_named(written, copied, damage, message):
    tensors = load_file(copied / folders.WEIGHTS)
    damage(tensors)
    save_file(tensors, copied / folders.WEIGHTS)
    with pytest.raises(ValueError, match=message):
        read(written / "base", copied)


def test_missing_and_damaged_weights(written, copied):
    path = copied / folders.WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged or cut short"):
        read(written / "base", copied)
    path.unlink()
    (copied / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(FileNotFoundError, match="Pickled adapters are not read"):
        read(written / "base", copied)


def test_an_adapter_of_some_layers_only_is_refused(written, copied):
    """A pattern that names one layer leaves the others' tensors missing."""
    tensors = load_file(copied / folders.WEIGHTS)
    save_file({k: v for k, v in tensors.items() if "layers.0" in k}, copied / folders.WEIGHTS)
    with pytest.raises(ValueError, match="missing tensor .*layers.1"):
        read(written / "base", copied)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (["v_proj", "q_proj"], ("q_proj", "v_proj")),
        (r".*\.[qv]_proj", ("q_proj", "v_proj")),
        (["model.layers.0.self_attn.q_proj"], ("q_proj",)),
        ("all-linear", tuple(lora.PROJECTIONS)),
    ],
)
def test_targets_from_a_list_or_a_pattern(tmp_path, value, expected):
    raw = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "target_modules": value}
    (tmp_path / folders.CONFIG).write_text(json.dumps(raw))
    assert folders.read_config(tmp_path).targets == expected
