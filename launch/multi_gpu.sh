#!/usr/bin/env bash
# Trains on all GPUs of a host, or of several hosts: one process a host.
#
# One host:
#   launch/multi_gpu.sh --config=configs/mistral_icd.py --workdir=runs/mistral_icd
#
# Several hosts: the same command on each, which see the same files, with
#   COORDINATOR=host0:8476 NUM_HOSTS=4 HOST_INDEX=0    (1, 2, 3 on the others)
#
# PYTHON is the interpreter of the environment in which radonc_jax is installed.
set -euo pipefail

if [ -n "${COORDINATOR:-}" ]; then
  : "${NUM_HOSTS:?set NUM_HOSTS to the number of hosts}"
  : "${HOST_INDEX:?set HOST_INDEX to the number of this host, counted from 0}"
  export JAX_COORDINATOR_ADDRESS=$COORDINATOR JAX_NUM_PROCESSES=$NUM_HOSTS JAX_PROCESS_ID=$HOST_INDEX
fi
# JAX takes three quarters of the GPU's memory unless told otherwise.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
exec "${PYTHON:-python3}" -m radonc_jax.train "$@"
