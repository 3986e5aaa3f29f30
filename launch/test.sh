#!/usr/bin/env bash
# Checks everything: style (ruff) and tests (pytest), in an environment of its own.
#   launch/test.sh                 all of it
#   launch/test.sh tests/test_lora.py -k dora      arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
make_environment .venv-test "[test]"
export JAX_PLATFORMS=cpu HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
"$python" -m ruff check .
"$python" -m ruff format --check .
# Two files at a time; a file stays in one process.
exec "$python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
