"""Answers on the disk as soon as they are there, so that a killed evaluation goes on."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from radonc_jax import parallel

FORMAT = 1  # raised where answers of an older release may differ: they are not taken then


class Journal:
    """One line an answer, appended and flushed; keyed by all that an answer depends on.

    Lines of another source are never taken for answers of this one: the key of each holds the
    source. A line in which a process was killed is cut off. In a run of several processes the main
    one reads and writes, and all know the same.

    Args:
      path: made if absent, its folder too.
      source: what the answers come from, as JSON takes it: fingerprints of base and adapter, and
        every setting that could change an answer.
    """

    def __init__(self, path: Path, source: Mapping):
        self.path = Path(path)
        self._source = json.dumps({"format": FORMAT, "source": source}, sort_keys=True)
        self._file = None
        content = b""
        if parallel.is_main_process():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.is_file():
                content = self.path.read_bytes()
                content = content[: content.rfind(b"\n") + 1]
            self._file = open(self.path, "ab")  # noqa: SIM115 - closed by `close`
            self._file.truncate(len(content))
        content = parallel.from_main(content)
        self._answers, self._used = {}, set()
        for line in content.splitlines():
            try:
                entry = json.loads(line)
                self._answers[entry.pop("key")] = entry
            except (ValueError, KeyError, AttributeError):
                continue  # not written by us: the case is answered again

    def key(self, prompt: Sequence[int], constraint: str) -> str:
        """Of a prompt's token ids and what its answer is held to."""
        parts = (self._source, constraint, json.dumps(list(map(int, prompt))))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    @property
    def count(self) -> int:
        """Answers that are there, whatever their source."""
        return len(self._answers)

    def get(self, key: str) -> dict | None:
        self._used.add(key)
        return self._answers.get(key)

    def add(self, key: str, entry: Mapping) -> None:
        """Writes an answer; it survives the process from here on."""
        self._answers[key] = dict(entry)
        if self._file is not None:
            try:
                line = json.dumps({"key": key, **entry}, allow_nan=False)
            except ValueError:  # a log-probability that is no number: the caller refuses it
                return
            self._file.write(line.encode() + b"\n")
            self._file.flush()

    def drop_others(self) -> None:
        """Forgets answers that were not looked up: they are of another source, or to no question
        of this one, and would be read for ever."""
        if self._answers.keys() <= self._used:
            return
        self._answers = {key: self._answers[key] for key in self._answers if key in self._used}
        if self._file is None:
            return
        self._file.close()
        aside = self.path.with_name(self.path.name + ".partial")
        with open(aside, "wb") as file:
            for key, entry in self._answers.items():
                file.write(json.dumps({"key": key, **entry}).encode() + b"\n")
        aside.replace(self.path)
        self._file = open(self.path, "ab")  # noqa: SIM115 - closed by `close`

    def clear(self) -> None:
        """Forgets all answers: they are kept elsewhere now."""
        self._answers = {}
        if self._file is not None:
            self._file.truncate(0)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def remove(self) -> None:
        """Closes and deletes the file."""
        self.close()
        if self._file is not None:
            self.path.unlink(missing_ok=True)
