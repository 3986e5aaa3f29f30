"""Writes a synthetic raw extract (no patient data) to try the pipeline on.

    python -m radonc_jax.synthesize --cases=15724 --seed=0 --output=extract.csv

Beside it: extract.csv.ceiling.json, the best accuracy that any reader of the diagnosis text can
reach per task, and extract.csv.ceiling.parquet, the same per patient (`prepare` reads it).
"""

from pathlib import Path

from absl import flags

from radonc_jax import command
from radonc_jax.data import synthetic

_CASES = flags.DEFINE_integer("cases", 15_724, "Number of patients; rows are one per plan.")
_SEED = flags.DEFINE_integer("seed", 0, "The same seed and cases give the same file.")
_OUTPUT = flags.DEFINE_string("output", "extract.csv", "The CSV file to write.")


def main() -> None:
    extract = synthetic.make_extract(_CASES.value, _SEED.value)
    ceiling = synthetic.write_extract(extract, Path(_OUTPUT.value))
    print(f"{_OUTPUT.value}: {_CASES.value} patients, {len(extract.table)} plan rows")
    print("ceiling: " + ", ".join(f"{task} {value:.3f}" for task, value in ceiling.items()))


if __name__ == "__main__":
    command.run(main)
