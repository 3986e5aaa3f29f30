"""What the benchmarks check of themselves."""

import importlib.util
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from absl import flags
from conftest import ROOT, command_environment


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
    different = training.report(results, {})
    assert different == ([] if agree else ["peft"])
    written = json.loads((tmp_path / "training.json").read_text())
    assert written["differing_losses"] == ([] if agree else ["peft"])
    assert "peft" in written["environment"]["versions"]


def test_a_benchmark_whose_ways_differ_ends_with_an_error(training, monkeypatch):
    def run(command, **_):
        losses = (9.1,) if "--one=peft" in command else (9.0,)
        return SimpleNamespace(returncode=0, stdout=json.dumps(turns(losses)[0]))

    monkeypatch.setattr(training, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(training, "WAYS", ("radonc_jax", "peft"))
    with pytest.raises(SystemExit, match="other losses than those of radonc_jax: peft"):
        training.main(["training"])


@pytest.mark.long
@pytest.mark.slow
def test_single_programs_are_measured(tmp_path):
    """With a tiny model on a CPU; on a GPU the same command measures Mistral-7B's shapes."""
    path = tmp_path / "programs.json"
    subprocess.run(
        [
            sys.executable,
            "benchmarks/programs.py",
            "--size=tiny",
            "--repeats=1",
            f"--output={path}",
        ],
        cwd=ROOT,
        env=command_environment() | {"PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
        timeout=500,
    )
    found = json.loads(path.read_text())
    losses = {round(form["loss"], 5) for form in found["training"].values()}
    assert len(found["training"]) == 4 and len(losses) == 1
    assert found["decoding"]["decode step"]["runs"] == 64
