"""What a run leaves behind besides its weights: config, manifest, metrics, progress.

Only the main process writes. No clinical text passes through here.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import jax
from tqdm import tqdm

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "transformers",
    "peft",
    "tokenizers",
    "qwix",
    "safetensors",
    "scikit-learn",
    "scipy",
    "rouge-score",
    "simple_icd_10_cm",
    "numpy",
)
# Settings that may differ between a run and its continuation: none changes what is learned.
FREE_KEYS = (
    ("train", "log_every"),
    ("train", "recompute"),
    ("decode", "batch"),
    ("decode", "constrained"),
    ("final_evaluation",),
)
# Dropout masks are drawn by place in the batch, which these move.
FREE_WITHOUT_DROPOUT = (
    "train.attention",
    "batch.microbatches",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
)


def write_json(path: Path, content) -> None:
    """Writes aside, then renames: the file is whole or absent. NaN is refused."""
    aside = path.with_name(path.name + ".partial")
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_sha256(paths: Iterable[Path]) -> dict[str, str]:
    """{file name: sha256}, several files at a time."""
    paths = list(paths)
    with ThreadPoolExecutor(8) as pool:
        return dict(zip((p.name for p in paths), pool.map(file_sha256, paths), strict=True))


def base_sha256(folder: Path, main: bool, *, weights: bool = True) -> dict[str, str] | None:
    """Hashes of a Hugging Face folder's config, tokenizer and (which takes long) weights; None on
    other processes than the main one."""
    if not main:
        return None
    patterns = ("config.json", "generation_config.json", "tokenizer*")
    patterns += ("*.safetensors",) * weights
    return files_sha256(sorted(p for pattern in patterns for p in Path(folder).glob(pattern)))


def cohort_sha256(folder: str | Path) -> dict:
    """Where the cohort lies, and the hash of its manifest, which hashes every file of it."""
    return {
        "folder": str(folder),
        "manifest_sha256": file_sha256(Path(folder) / "manifest.json"),
    }


def environment() -> dict:
    """Versions, devices and code revision, for the run manifest."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "python": platform.python_version(),
        "versions": versions,
        "devices": sorted({d.device_kind for d in jax.devices()}),
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "code_revision": _revision(),
        "command": sys.argv[1:],
    }


def _revision() -> str | None:
    """The git commit of the code, with "+changes" when the tree is not that commit."""
    here = Path(__file__).resolve().parent

    def git(*arguments):
        return subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def check_folder(workdir: Path, settings: Mapping) -> None:
    """ValueError if `workdir` is the folder of a run of other settings; they are named."""
    path = Path(workdir) / "config.json"
    if not path.is_file():
        return
    different = differing_keys(json.loads(path.read_text(encoding="utf-8")), settings)
    if settings["lora"]["dropout"] == 0:
        different = [name for name in different if name not in FREE_WITHOUT_DROPOUT]
    if different:
        raise ValueError(
            f"{workdir} is the folder of another run (it differs in {different}): "
            "choose another --workdir, or the same config to resume"
        )


def check_rows(workdir: Path, rows: list[int]) -> None:
    """ValueError if a run with dropout would go on with its batches cut in another way.

    Masks are drawn by the place in the batch, which the number of devices moves.
    """
    path = Path(workdir) / "manifest.json"
    if not path.is_file():
        return
    then = json.loads(path.read_text(encoding="utf-8")).get("rows")
    if then is not None and then != rows:
        raise ValueError(
            f"{workdir} was begun with {then} microbatches, rows and tokens a row, which would be "
            f"{rows} here: with dropout that would be another run. Go on with as many devices of "
            "the kind and with the attention (manifest.json) as before, or set lora.dropout=0 in "
            "a new --workdir"
        )


class Run:
    """A run folder open for writing.

    Args:
      workdir: made if absent; an existing one must be of the same settings.
      settings: of the run, as a plain dict.
      main: whether this process writes.

    Raises:
      ValueError: the folder is another run's, with the keys that differ.
    """

    def __init__(self, workdir: Path, settings: Mapping, *, main: bool):
        check_folder(workdir, settings)
        self.workdir, self._main = Path(workdir), main
        path = self.workdir / "config.json"
        self._metrics = self._board = self._bar = None
        if main:
            self.workdir.mkdir(parents=True, exist_ok=True)
            if not path.is_file():
                write_json(path, settings)

    def write_manifest(self, content: Mapping) -> None:
        if self._main:
            write_json(self.workdir / "manifest.json", content)

    def start(self, step: int, steps: int) -> None:
        """Opens the metrics at a step: lines of later steps, left by a killed run, go."""
        if not self._main:
            return
        from tensorboardX import SummaryWriter

        path = self.workdir / "metrics.jsonl"
        if path.is_file():
            kept = []
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue  # the line in which the run was killed
                if entry["step"] <= step:
                    kept.append(line + "\n")
            aside = path.with_name(path.name + ".partial")
            aside.write_text("".join(kept), encoding="utf-8")
            os.replace(aside, path)
        self._metrics = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by `close`
        self._board = SummaryWriter(str(self.workdir / "tensorboard"), purge_step=step + 1)
        # In a terminal a bar; in a log file a line now and then.
        self._bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True, disable=None)
        self._began, self._first, self._steps = time.monotonic(), step, steps

    def log(self, step: int, split: str, values: Mapping[str, float], *, show: bool) -> None:
        """Appends a line to `metrics.jsonl`; with `show`, also to TensorBoard and the bar."""
        if not self._main:
            return
        self._metrics.write(json.dumps({"step": step, "split": split, **values}) + "\n")
        self._metrics.flush()
        if not show:
            return
        for name, value in values.items():
            self._board.add_scalar(f"{split}/{name}", value, step)
        if split != "train":
            shown = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
            self._bar.write(f"step {step} {split}: {shown}")
            return
        shown = f"loss {values['loss']:.4f}, {values['tokens_per_second']:.0f} tokens/s"
        self._bar.set_postfix_str(shown, refresh=False)
        if self._bar.disable:
            spent = time.monotonic() - self._began
            left = spent / (step - self._first) * (self._steps - step)
            print(f"step {step}/{self._steps}: {shown}, {left:.0f} s left", flush=True)

    def logged(self, step: int, split: str) -> dict[str, float] | None:
        """What stands in `metrics.jsonl` of a step; None if nothing does. On the main process."""
        for line in (self.workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            if (entry.pop("step"), entry.pop("split")) == (step, split):
                return entry
        return None

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def close(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
            self._board.close()
            self._bar.close()


def differing_keys(old: Mapping, new: Mapping, prefix: tuple[str, ...] = ()) -> list[str]:
    """Dotted names of settings that differ and matter."""
    different = []
    for key in sorted(set(old) | set(new)):
        name = (*prefix, key)
        if name in FREE_KEYS:
            continue
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            different += differing_keys(before, after, name)
        elif _plain(before) != _plain(after):
            different.append(".".join(name))
    return different


def _plain(value):
    return list(value) if isinstance(value, tuple) else value
