#!/usr/bin/env bash
# The whole method on two CPU cores with synthetic cases, in about ten minutes; no network is used
# after the installation. Everything is written under demo/. A killed demo, started again, goes on.
#   launch/demo.sh
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
make_environment .venv ""
export JAX_PLATFORMS=cpu HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export JAX_COMPILATION_CACHE_DIR=$PWD/demo/compiled JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.5

step() { echo; echo "== $1"; }
run() { "$python" -m "radonc_jax.$@"; }
mkdir -p demo

step "A synthetic extract, as an oncology information system would export it"
[ -f demo/extract.csv ] || run synthesize --cases=7000 --seed=0 --output=demo/extract.csv

step "The cohort: who is kept, who is not and why, split by patient"
[ -d demo/cohort ] || run prepare --input=demo/extract.csv --output=demo/cohort \
  --test_fraction=0.12 --validation_fraction=0.05

step "A base model: tokenizer and small Mistral, trained on plain text only"
if [ ! -d demo/base ]; then
  [ -d demo/start ] || run initialize --cohort=demo/cohort --output=demo/start
  run train --config=configs/tiny_base.py --workdir=demo/runs/base
  run export --workdir=demo/runs/base --format=merged --output=demo/base
fi

for task in regimen modality icd; do
  step "LoRA fine-tuning for the task '$task'; original and tuned answer the held-out cases"
  run train --config="configs/tiny_$task.py" --workdir="demo/runs/$task"
done

step "The report"
run compare --runs=demo/runs/regimen,demo/runs/modality,demo/runs/icd --output=demo/report
echo
echo "Open demo/report/report.html. It took $((SECONDS / 60)) min $((SECONDS % 60)) s."
