"""What the benchmarks check of themselves."""

import importlib.util
import json

import pytest
from absl import flags
from conftest import ROOT


@pytest.fixture
def training(monkeypatch, tmp_path):
    """benchmarks/training.py, with flags of its own that leave no trace."""
    values = flags.FlagValues()
    for name in ("DEFINE_enum", "DEFINE_integer", "DEFINE_list", "DEFINE_string"):
        own = getattr(flags, name)
        monkeypatch.setattr(flags, name, lambda *a, own=own, **k: own(*a, **k, flag_values=values))
    spec = importlib.util.spec_from_file_location("training", ROOT / "benchmarks/training.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    values(["training", f"--output={tmp_path / 'training.json'}"])
    return module


def turns(*losses):
    return [{"tokens_per_second": [1.0], "peak_bytes": 1, "losses": list(x)} for x in losses]


@pytest.mark.parametrize(
    ("losses", "agree"),
    [
        ((9.08358, 9.06221), True),
        ((9.08360, 9.06221), True),
        ((9.08358, 9.06321), False),
        ((9.08358,), False),
    ],
    ids=str,
)
def test_ways_that_train_something_else_are_not_compared(training, tmp_path, losses, agree):
    results = {"radonc_jax": turns((9.08358, 9.06221)), "peft": turns((9.08358, 9.06221), losses)}
    if agree:
        training.report(results, {})
    else:
        with pytest.raises(SystemExit, match="other losses than those of radonc_jax: peft"):
            training.report(results, {})
    written = json.loads((tmp_path / "training.json").read_text())
    assert written["differing_losses"] == ([] if agree else ["peft"])
    assert "peft" in written["environment"]["versions"]
