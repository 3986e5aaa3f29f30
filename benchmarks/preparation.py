"""Time and peak memory of `prepare` on extracts of 100,000 and 1,000,000 plan rows.

    python benchmarks/preparation.py                       # makes the extracts, about 5 minutes
    python benchmarks/preparation.py --rows 100000 --keep=/some/folder

The extracts are synthetic: parts of 25,000 patients, each of its own seed, their ids renumbered, so
that texts repeat no more than in one large draw. `prepare` runs as the command that users run, in
a process of its own; peak memory is that process' maximum resident set as the kernel counts it.
The goal: a million rows in 180 s and 4 GiB on two cores, and time in proportion to the rows.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from radonc_jax.data import synthetic  # noqa: E402

PATIENTS_A_PART = 25_000
LIBRARIES = ("pandas", "pyarrow", "numpy", "simple_icd_10_cm", "scipy", "matplotlib")


def write_extract(path: Path, rows: int) -> tuple[int, int]:
    """An extract of `rows` plan rows as csv; returns (rows, patients). The last patient's rows may
    be cut off, as an export's are."""
    written, patients, part = 0, 0, 0
    draft = path.with_suffix(".part")
    with draft.open("w", encoding="utf-8", newline="") as file:
        while written < rows:
            table = synthetic.make_extract(PATIENTS_A_PART, 1000 + part).table.head(rows - written)
            table = table.assign(patient_id=f"P{part:03d}" + table["patient_id"].str[3:])
            table.to_csv(file, index=False, header=part == 0, lineterminator="\n")
            written += len(table)
            patients += table["patient_id"].nunique()
            part += 1
    draft.rename(path)
    return written, patients


def measure(extract: Path, output: Path, further: list[str]) -> dict:
    """Runs prepare; wall and processor seconds, peak memory and what the cohort holds."""
    command = [
        sys.executable, "-m", "radonc_jax.prepare", f"--input={extract}", f"--output={output}",
        *further,
    ]  # fmt: skip
    started = time.perf_counter()
    process = os.posix_spawn(
        sys.executable, command, os.environ | {"PYTHONPATH": str(ROOT)},
        file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)],
    )  # fmt: skip
    _, status, usage = os.wait4(process, 0)
    wall = time.perf_counter() - started
    if status:
        raise SystemExit(f"error: prepare failed on {extract}; see above")
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["assessed"] == manifest["kept"] + sum(manifest["excluded"].values())
    return {
        "rows": manifest["rows"]["read"],
        "patients": manifest["assessed"],
        "kept": manifest["kept"],
        "bytes": extract.stat().st_size,
        "seconds": round(wall, 1),
        "processor_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_gib": round(usage.ru_maxrss / 2**20, 2),  # Linux counts KiB
    }


def machine() -> dict:
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in LIBRARIES},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--keep", type=Path, help="folder in which extracts stay for another run")
    parser.add_argument("--note", default="", help="what else ran on the machine, for the result")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results" / "preparation.json"
    )
    parser.add_argument("--flag", action="append", default=[], help="a further flag of prepare")
    options = parser.parse_args()
    results = {"machine": machine(), "note": options.note, "flags": options.flag, "runs": []}
    with tempfile.TemporaryDirectory(prefix="preparation-") as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for rows in options.rows:
            extract = folder / f"extract-{rows}.csv"
            if not extract.is_file():
                write_extract(extract, rows)
            run = measure(extract, Path(scratch) / f"cohort-{rows}", options.flag)
            results["runs"].append(run)
            print(
                f"{run['rows']:>9,} rows {run['kept']:>8,} kept {run['seconds']:>7.1f} s "
                f"{run['processor_seconds']:>7.1f} s processor {run['peak_gib']:>5.2f} GiB",
                flush=True,
            )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    draft = options.output.with_suffix(".part")
    draft.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    draft.rename(options.output)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
