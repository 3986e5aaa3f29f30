"""From the name of a model to its folder, without jax, so that a missing model is told at once."""

import difflib
import json
import socket
import threading
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from radonc_jax.models import tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
GENERATION = "generation_config.json"
TOKENIZER_FILES = (
    tokenizer.SENTENCEPIECE,
    tokenizer.JSON,
    tokenizer.SETTINGS,
    tokenizer.ADDED,
    "special_tokens_map.json",
    "chat_template.jinja",
)
# What a hub id is asked for; without the second copies of the weights that some repositories keep.
DOWNLOADED = ("config.json", GENERATION, "model*.safetensors", INDEX, *TOKENIZER_FILES)
REACH_SECONDS = 0.7  # how long a hub may take to accept a connection


def resolve(model: str, workdir: Path | None = None, option: str = "--config.model") -> Path:
    """The folder of a model: `model` itself, or the snapshot of a hub id.

    A hub id is asked for once: a snapshot in the local cache is used without a look at the network,
    and a run goes on with the revision it began with. A folder never touches the network, nor does
    one that is not there: what begins with "/", "." or "~" or has not one "/" is no hub id, nor is
    what would lie in a folder that is there, unless it is pinned or in the cache.

    Args:
      model: folder; or hub id, which may be pinned as `owner/name@revision`.
      workdir: run folder whose manifest may name the revision that the run began with, or where
        the folder lay, should `model` be relative to another working directory.
      option: by which the caller is given a folder, for the error.

    Raises:
      FileNotFoundError: neither a folder nor a hub id that is cached or can be downloaded.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    began = _recorded(workdir, model) if workdir else {}
    revision_then, then = began.get("revision"), None
    if revision_then is None and Path(began.get("folder") or "").is_absolute():
        then = Path(began["folder"])
        if then.is_dir():
            return then
    near = _near(folder)
    advice = (
        f"model {model!r} is not a folder here, in {Path.cwd()}"
        f"{'' if then in (None, folder.absolute()) else f', nor is {then}, where the run had it'}"
        f"{f' (did you mean {near}?)' if near else ''}. Pass a local Hugging Face folder "
        f"({option}=/path/to/folder with config.json, *.safetensors and the tokenizer)"
    )
    if model.count("/") != 1 or model.startswith(("/", ".", "~")):
        raise FileNotFoundError(advice)
    name, _, wanted = model.partition("@")
    wanted = wanted or revision_then
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    def download(**options) -> Path:
        patterns = list(DOWNLOADED)
        return Path(
            snapshot_download(name, revision=wanted or None, allow_patterns=patterns, **options)
        )

    try:
        folder = download(local_files_only=True)
        if _is_whole(folder):
            return folder
    except HFValidationError:
        raise FileNotFoundError(advice) from None
    except (OSError, ValueError, KeyError):
        pass
    if not wanted and folder.parent.is_dir():
        raise FileNotFoundError(
            f"{advice}. If it is a hub id, it has to be pinned ({model}@revision): it is taken for "
            f"a path, because there is a folder {str(folder.parent)!r} here"
        )
    reason = "HF_HUB_OFFLINE is set"
    if not constants.HF_HUB_OFFLINE:
        reason = f"{constants.ENDPOINT} could not be reached"
        if _is_reachable(constants.ENDPOINT):
            try:
                return download()
            except (HfHubHTTPError, OSError) as error:
                reason = f"{constants.ENDPOINT} refused or broke off: {type(error).__name__}"
    raise FileNotFoundError(
        f"{advice}, or download {model!r} on a machine with access to the hub ({reason})"
    )


def revision(folder: Path) -> str | None:
    """The revision of a hub snapshot, which its folder is named by; None for other folders."""
    folder = Path(folder)
    return folder.name if folder.parent.name == "snapshots" else None


def _recorded(workdir: Path, model: str) -> dict:
    """What the manifest of the run in `workdir` tells of its base `model`; {} where it does not."""
    path = Path(workdir) / "manifest.json"
    if not path.is_file():
        return {}
    base = json.loads(path.read_text(encoding="utf-8")).get("base") or {}
    return base if base.get("model") == model else {}


def _near(folder: Path) -> Path | None:
    """A model's folder beside where `folder` would lie whose name is much like it."""
    try:
        configs = list(folder.parent.glob("*/config.json"))
        names = [path.parent.name for path in configs if any(path.parent.glob("*.safetensors"))]
    except OSError:
        return None
    close = difflib.get_close_matches(folder.name, names, n=1)
    return folder.parent / close[0] if close else None


def _is_reachable(endpoint: str) -> bool:
    """Whether a connection can be opened; the hub's own client would try for minutes."""
    if urllib.request.getproxies():
        return True  # only the proxy can tell
    url = urlsplit(endpoint)
    port = url.port or (80 if url.scheme == "http" else 443)
    reached = threading.Event()

    def connect():
        try:
            socket.create_connection((url.hostname, port), timeout=REACH_SECONDS).close()
            reached.set()
        except OSError:
            pass

    # In a thread, because the look-up of a name has no time limit of its own.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(REACH_SECONDS)
    return reached.is_set()


def _is_whole(folder: Path) -> bool:
    """Whether all weights are there: an interrupted download leaves a folder without some."""
    index = folder / INDEX
    if not index.is_file():
        return (folder / WEIGHTS).is_file()
    weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    return all((folder / name).is_file() for name in weight_map.values())
