"""Recall and precision of de-identification on identifiers planted in synthetic notes.

    python -m benchmarks.deidentification --notes=4000 --seed=0

Writes benchmarks/results/deidentification.json. An identifier counts as found when no letter or
digit of it is left outside the spans, of whatever class: what leaks counts. Precision is the share
of spans of a class that touch something planted. Intervals are Wilson's, 95 %.

Three sets of families and names are told apart: what the rules were written against, what they
were revised by, and what was written after that and changed no rule (see `planting`). All are
invented and cleaner than a clinic's notes, so expect less on real ones.
"""

import json
import platform
import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import numpy as np
from absl import app, flags
from scipy.stats import binomtest

from benchmarks.planting import SETS, Planter
from radonc_jax.data.deidentify import CLASSES, RULES, find_spans_of
from radonc_jax.data.synthetic import make_extract

_NOTES = flags.DEFINE_integer("notes", 4000, "Synthetic notes to plant identifiers in.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of notes and identifiers.")
_OUTPUT = flags.DEFINE_string(
    "output", str(Path(__file__).parent / "results" / "deidentification.json"), "JSON to write."
)
_MISSES = flags.DEFINE_bool("misses", False, "Print what was missed (invented text, no patient's).")


def rate(hits: int, of: int) -> dict:
    """Share with Wilson's 95 % interval; None of nothing."""
    if not of:
        return {"value": None, "low": None, "high": None, "hits": 0, "of": 0}
    interval = binomtest(hits, of).proportion_ci(0.95, method="wilson")
    return {
        "value": hits / of, "low": interval.low, "high": interval.high, "hits": hits, "of": of,
    }  # fmt: skip


def planted_notes(notes: list[str], seed: int, which: str):
    """Each note with a sentence of each of two families and one trap planted in it."""
    rng = np.random.Generator(np.random.PCG64([seed, list(SETS).index(which)]))
    planter = Planter(rng, which)
    families = list(planter.families)
    for index, note in enumerate(notes):
        chosen = [families[(2 * index + i) % len(families)] for i in (0, 1)]
        yield planter.plant(note, chosen, traps=1)


def measure(notes: list[str], seed: int, which: str) -> dict:
    """Recall and precision per class, recall per family, and the notes' own false positives."""
    texts, truths = zip(*planted_notes(notes, seed, which), strict=True)
    found = find_spans_of(texts)
    recalled, planted, right, said, family_hits, family_all = (Counter() for _ in range(6))
    for index, (text, truth) in enumerate(zip(texts, truths, strict=True)):
        spans = found.get(index, ())
        covered = np.zeros(len(text), bool)
        for span in spans:
            covered[span.start : span.end] = True
            said[span.kind] += 1
            touches = any(s.start < span.end and span.start < s.end for s in truth)
            right[span.kind] += touches
            if not touches and _MISSES.value:
                print("false:", span.rule, repr(text[max(0, span.start - 30) : span.end + 20]))
        for spot in truth:
            whole = all(covered[i] for i in range(spot.start, spot.end) if text[i].isalnum())
            planted[spot.kind] += 1
            recalled[spot.kind] += whole
            family_all[spot.family] += 1
            family_hits[spot.family] += whole
            if not whole and _MISSES.value:
                print("missed:", spot.family, repr(text[max(0, spot.start - 30) : spot.end + 15]))
    return {
        "notes": len(texts),
        "recall": {kind: rate(recalled[kind], planted[kind]) for kind in CLASSES},
        "precision": {kind: rate(right[kind], said[kind]) for kind in CLASSES},
        "recall_by_family": {
            name: rate(family_hits[name], count) for name, count in family_all.items()
        },
        "recall_all": rate(recalled.total(), planted.total()),
        "precision_all": rate(right.total(), said.total()),
    }


def show(title: str, result: dict) -> None:
    def text(share: dict) -> str:
        if share["value"] is None:
            return f"{'-':>31}"
        interval = f"[{share['low']:.3f}, {share['high']:.3f}]"
        return f"{share['value']:.3f} {interval} {share['hits']:>5}/{share['of']:<5}"

    print(f"\n{title}\n{'class':<13}{'recall':<34}precision")
    for kind in CLASSES:
        print(f"{kind:<13}{text(result['recall'][kind]):<34}{text(result['precision'][kind])}")
    print(f"{'all':<13}{text(result['recall_all']):<34}{text(result['precision_all'])}")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"error: unexpected argument {argv[1]!r}; every option is a --flag")
    table = make_extract(_NOTES.value, _SEED.value).table
    notes = [note for note in table["diagnosis"].drop_duplicates() if len(note) > 20]
    notes = notes[: _NOTES.value]
    started = time.perf_counter()
    plain = sum(map(len, find_spans_of(notes).values()))
    results = {
        **{which: measure(notes, _SEED.value, which) for which in SETS},
        "findings_in_plain_notes": plain,
        "seed": _SEED.value,
        "rules": len(RULES),
        "seconds": round(time.perf_counter() - started, 1),
        "versions": {"python": platform.python_version(), "pyarrow": version("pyarrow")},
    }
    for which in SETS:
        show(f"{which} families, names and traps", results[which])
    print(f"\nfindings in {len(notes)} plain notes: {plain}")
    output = Path(_OUTPUT.value)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
