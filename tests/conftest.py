"""Tests see eight CPU devices; a mesh of fewer is made from the first of them."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the suite's time is compilation of small programs that run once.
FAST_COMPILE = "--xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {FAST_COMPILE}"
# ... and many are the same in several tests and in the commands that these start.
CACHE = Path(__file__).parent.parent / ".pytest_cache" / "compiled"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest  # noqa: E402 - the variables above must be set before jax is imported

ROOT = Path(__file__).parent.parent


def pytest_collection_modifyitems(items):
    """Files with the most slow tests first: one begun last would leave the other core idle."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def run_command(command: str, *arguments, devices: int = 1, check: bool = True, **environment):
    """`python -m radonc_jax.<command> ...` in a process of its own, from the root of the tree."""
    result = subprocess.run(
        [sys.executable, "-m", f"radonc_jax.{command}", *map(str, arguments)],
        cwd=ROOT,
        env=command_environment(devices) | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    if check:
        assert result.returncode == 0, result.stderr[-3000:]
    return result


def command_environment(devices: int = 1) -> dict[str, str]:
    flags = f"--xla_force_host_platform_device_count={devices} {FAST_COMPILE}"
    return os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """A small synthetic cohort and a small random model, made by the commands themselves."""
    folder = tmp_path_factory.mktemp("workspace")
    run_command("synthesize", "--cases=400", "--seed=1", f"--output={folder / 'extract.csv'}")
    run_command(
        "prepare",
        f"--input={folder / 'extract.csv'}",
        f"--output={folder / 'cohort'}",
        "--test_fraction=0.1",
        "--validation_fraction=0.1",
    )
    run_command(
        "initialize",
        f"--cohort={folder / 'cohort'}",
        f"--output={folder / 'model'}",
        "--vocab_size=700",
        "--hidden_size=32",
        "--num_heads=4",
        "--num_kv_heads=2",
        "--intermediate_size=48",
    )
    return SimpleNamespace(
        folder=folder,
        extract=folder / "extract.csv",
        cohort=folder / "cohort",
        model=folder / "model",
        arguments=(
            "--config=configs/tiny_icd.py",
            f"--config.cohort={folder / 'cohort'}",
            f"--config.model={folder / 'model'}",
            "--config.lora.rank=4",
            "--config.batch.examples=16",
            "--config.train.validation_cases=8",
            "--config.decode.max_new_tokens=12",
            "--config.decode.constrained=cohort",  # few codes, quickly made into a trie
        ),
    )
