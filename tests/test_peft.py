"""Adapters in PEFT's folders: in and out without drift, and every misfit named."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from radonc_jax import parallel
from radonc_jax.models import huggingface, lora
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
    layers = huggingface.read_config(base).num_layers
    config = folders.read_config(folder, layers)
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
        {
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            # The first entry that matches counts; PEFT writes them in alphabetical order.
            "rank_pattern": {r"mlp\..*": 2, "q_proj": 5, r"self_attn\.[qv]_proj": 4},
            "alpha_pattern": {"self_attn.v_proj": 7, "proj": 9, "none": 11},
            "use_rslora": True,
        },
        {
            "target_modules": "all-linear",
            "exclude_modules": r".*\.(mlp|self_attn)\.[gou].*",
            "rank_pattern": {r"^model.layers.[012].self_attn.k_proj": 6},
            "alpha_pattern": {"down_proj": 2.5},
            "use_dora": True,
        },
        {"target_modules": r".*\.[qk]_proj", "exclude_modules": ["self_attn.k_proj"]},
    ],
    ids=["list", "all-linear", "regex-rslora", "dora", "patterns-rslora", "patterns-dora", "but"],
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
    assert folders.read_config(tmp_path / "out", 3) == config
    raw = json.loads((tmp_path / "out" / folders.CONFIG).read_text())
    assert (raw["peft_type"], raw["task_type"]) == ("LORA", "CAUSAL_LM")
    assert raw["base_model_name_or_path"] == "some/base"
    assert raw["lora_dropout"] == 0.1

    base = checkpoints.write(tmp_path / "again", "mistral_window")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    np.testing.assert_array_equal(checkpoints.reference_logits(again, tokens), expected)
    assert arithmetic(again) == arithmetic(theirs)


def arithmetic(model) -> dict:
    """What peft made of a configuration: {module: rank, scale, dropout, DoRA or not}."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            part = {key: getattr(module, key)["default"] for key in ("r", "scaling", "use_dora")}
            found[name] = part | {"dropout": module.lora_dropout["default"].p}
    assert found
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_adapter_stored_in_half_precision_keeps_its_values(written, copied, dtype):
    stored = {
        name: tensor.astype(jnp.dtype(dtype))
        for name, tensor in load_file(copied / folders.WEIGHTS).items()
    }
    save_file(stored, copied / folders.WEIGHTS)
    config, partition, frozen, adapter = read(written / "base", copied)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(adapter)} == {"float32"}
    folders.save_adapter(copied / "out", adapter, config, "some/base")
    again = load_file(copied / "out" / folders.WEIGHTS)
    assert set(again) == set(stored)
    for name, tensor in stored.items():
        np.testing.assert_array_equal(again[name], tensor.astype(np.float32))
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(written / "base"), copied
    ).eval()
    tokens = checkpoints.tokens()
    np.testing.assert_allclose(
        checkpoints.logits(partition.merge(adapter, frozen), tokens),
        checkpoints.reference_logits(theirs, tokens),
        atol=1e-4,
        rtol=0,
    )


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
        ("alpha_pattern", {"layers.0.self_attn.q_proj": 7}),
        ("alpha_pattern", {"(unbalanced": 7}),
        ("alpha_pattern", {"q_proj": "7"}),
        ("alpha_pattern", ["q_proj"]),
        ("bias", "all"),
        ("exclude_modules", ["q_proj"]),
        ("exclude_modules", r".*\.1\..*"),
        ("exclude_modules", 3),
        ("fan_in_fan_out", True),
        ("init_lora_weights", "pissa"),
        ("layers_to_transform", [0]),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("peft_type", "IA3"),
        ("rank_pattern", {r"layers\.[01]\..*q_proj": 7}),
        ("rank_pattern", {"q_proj": 0}),
        ("some_later_setting", 3),
        ("some_later_setting", 0),
        ("target_modules", ["q_proj", "lm_head"]),
        ("target_modules", ["q_proj", "embed_tokens"]),
        ("target_modules", ["layers.0.self_attn.q_proj"]),
        ("target_modules", ".*nothing"),
        ("target_modules", ".*(q_proj|lm_head)"),
        ("target_modules", ".*0.*q_proj"),
        ("target_modules", "(unbalanced"),
        ("target_modules", []),
        ("target_modules", None),
        ("target_parameters", ["mlp.experts"]),
        ("task_type", "SEQ_CLS"),
        ("trainable_token_indices", [1]),
        ("use_dora", "yes"),
        ("use_qalora", True),
        ("r", "8"),
        ("r", 0),
    ],
)
def test_an_unsupported_setting_is_named(copied, key, value):
    path = copied / folders.CONFIG
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, key: value}))
    message = {"r": "rank|r must be", "exclude_modules": "exclude_modules|target_modules"}
    with pytest.raises(ValueError, match=message.get(key, key)):
        folders.read_config(copied, 3)


def test_every_key_that_peft_writes_is_read_or_ignored_by_peft_or_refused(written, copied):
    path = copied / folders.CONFIG
    raw = json.loads(path.read_text())
    tokens = checkpoints.tokens()
    before = folders.read_config(copied, 3)
    known = set(peft.LoraConfig().to_dict())
    assert folders.READ <= known and set(raw) <= known

    def peft_logits():
        base = AutoModelForCausalLM.from_pretrained(written / "base")
        return checkpoints.reference_logits(peft.PeftModel.from_pretrained(base, copied), tokens)

    expected = peft_logits()
    others = {
        "auto_mapping": {"base_model_class": "Other", "parent_library": "other"},
        "inference_mode": not raw["inference_mode"],
        "loftq_config": {"loftq_bits": 4},
        "qalora_group_size": 4,
        "runtime_config": {"ephemeral_gpu_offload": True},
    }
    for key in sorted((known | folders.INERT) - folders.READ):
        path.write_text(json.dumps({**raw, key: others.get(key, "other")}))
        if key in folders.INERT:
            assert folders.read_config(copied, 3) == before
            np.testing.assert_array_equal(peft_logits(), expected, err_msg=key)
        else:
            with pytest.raises(ValueError, match=f"{key}='other' is not supported"):
                folders.read_config(copied, 3)


def test_a_folder_without_an_adapter(tmp_path):
    with pytest.raises(FileNotFoundError, match=folders.CONFIG):
        folders.read_config(tmp_path, 3)
    (tmp_path / folders.CONFIG).write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        folders.read_config(tmp_path, 3)


NAME = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop(NAME), f"missing tensor {NAME}"),
        (lambda t: t.update(extra=np.zeros(1)), "unexpected tensor extra"),
        (lambda t: t.update({NAME: np.zeros((4, 32))}), rf"{NAME} has shape \(4, 32\)"),
        (lambda t: t.update({NAME: t[NAME].astype(np.float64)}), f"{NAME} has dtype float64"),
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
    tensors = load_file(copied / folders.WEIGHTS)
    save_file({k: v for k, v in tensors.items() if "layers.0" in k}, copied / folders.WEIGHTS)
    with pytest.raises(ValueError, match="missing tensor .*layers.1"):
        read(written / "base", copied)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (["v_proj", "q_proj"], ("q_proj", "v_proj")),
        (r".*\.[qv]_proj", ("q_proj", "v_proj")),
        ([f"model.layers.{n}.self_attn.q_proj" for n in range(3)], ("q_proj",)),
        (r".*\.[0-9]+\.self_attn\.q_proj", ("q_proj",)),
        ("all-linear", tuple(lora.PROJECTIONS)),
        ("ALL-linear", tuple(lora.PROJECTIONS)),
    ],
)
def test_targets_from_a_list_or_a_pattern(tmp_path, value, expected):
    raw = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "target_modules": value}
    (tmp_path / folders.CONFIG).write_text(json.dumps(raw))
    assert folders.read_config(tmp_path, 3).targets == expected
