"""Every config file is whole, and a wrong key or value stops at once."""

import json
import sys
from pathlib import Path
from unittest import mock

import pytest
from absl import flags
from ml_collections import config_flags

from radonc_jax import settings

ROOT = Path(__file__).parent.parent
RUNS = [p for p in sorted((ROOT / "configs").glob("*_*.py")) if p.stem != "__init__"]


def load(path, *overrides):
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    arguments = ["test", f"--config={path}", *overrides]
    with mock.patch.object(sys, "argv", arguments):  # where overrides are looked for
        values(arguments)
    return values.config.to_dict()


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_config_becomes_settings_and_says_how_to_run(path):
    config = settings.from_mapping(load(path))
    text = path.read_text(encoding="utf-8")
    assert f"python -m radonc_jax.train --config=configs/{path.name}" in text
    assert "Hardware:" in text
    if path.stem != "tiny_base":
        assert config.task == path.stem.split("_")[1]


def test_all_models_and_tasks_have_one():
    names = {path.stem for path in RUNS} - {"tiny_base"}
    tasks = ("regimen", "modality", "icd", "all")
    assert names == {f"{m}_{t}" for m in ("mistral", "llama2", "tiny") for t in tasks}


def test_settings_survive_json():
    config = settings.from_mapping(load(RUNS[0]))
    assert settings.from_mapping(config.as_dict()) == config


def mapping(**sections):
    config = load(ROOT / "configs/tiny_icd.py")
    for name, value in sections.items():
        config[name] = config[name] | value if isinstance(value, dict) else value
    return config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "prognosis"}, "prognosis.*regimen"),
        ({"lora": {"targets": ("q_proj", "w_proj")}}, "w_proj"),
        ({"lora": {"rnak": 3}}, "config.lora.*rnak"),
        ({"lora": {"rank": 0}}, "rank"),
        ({"lora": {"dropout": 1.0}}, "dropout"),
        ({"lora": {"rank_pattern": {"w_proj": 3}}}, "rank_pattern.*w_proj"),
        ({"optimizer": {"loraplus_ratio": 0.0}}, "loraplus_ratio"),
        (
            {"trainable": "full", "precision": {"base": "float32"}}
            | {"optimizer": {"loraplus_ratio": 2.0}},
            "no adapter.*loraplus_ratio",
        ),
        (
            {"trainable": "full", "precision": {"base": "float32"}}
            | {"lora": {"init_from": "runs/icd"}},
            "no adapter.*init_from",
        ),
        ({"optimizer": {"schedule": "step"}}, "schedule"),
        ({"train": {"metric": "bleu"}}, "bleu"),
        ({"precision": {"base": "float8"}}, "float8"),
        ({"trainable": "some"}, "some"),
        ({"task": "text"}, "text"),
        ({"task": "regimen", "train": {"metric": "f1_macro"}}, "F1"),
        ({"mesh": 3}, "mesh"),
    ],
    ids=str,
)
def test_a_wrong_key_or_value_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        settings.from_mapping(mapping(**change))


def test_patterns_of_targets_from_a_file_or_the_command_line():
    arguments = (
        "--config.lora.rank_pattern={'q_proj': 4}",
        "--config.lora.alpha_pattern={'q_proj': 2.5}",
    )
    config = settings.from_mapping(load(ROOT / "configs/tiny_icd.py", *arguments))
    assert config.lora.rank_pattern == (("q_proj", 4),)
    assert config.lora.of("q_proj").alpha == 2.5
    assert hash(config.lora) and json.loads(json.dumps(config.as_dict()))["lora"] == (
        config.as_dict()["lora"] | {"targets": list(config.lora.targets)}
    )
    assert settings.from_mapping(json.loads(json.dumps(config.as_dict()))) == config


def test_a_misspelt_override_fails_at_once():
    path = ROOT / "configs/tiny_icd.py"
    assert load(path, "--config.lora.rank=3")["lora"]["rank"] == 3
    # Not absl's complaint of a flag that nobody defined: the config is asked, and lacks the key.
    with pytest.raises((AttributeError, KeyError), match="rnak"):
        load(path, "--config.lora.rnak=3")


def test_a_missing_key_is_named():
    config = mapping()
    del config["decode"]["batch"]
    with pytest.raises(ValueError, match="config.decode lacks.*batch"):
        settings.from_mapping(config)
