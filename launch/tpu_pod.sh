#!/usr/bin/env bash
# Trains on a Cloud TPU pod: every worker runs the same command; logs and exit codes are gathered.
#
#   TPU=my-pod ZONE=us-east5-a launch/tpu_pod.sh --config=configs/mistral_icd.py \
#       --workdir=/shared/runs/mistral_icd
#
# FOLDER (default radonc_jax) is the checkout on the workers, PYTHON (default python3) the
# interpreter there with `pip install -e '.[tpu]'` done; the run folder must be on storage that all
# workers share. Logs come to LOGS (default tpu_logs), a file a worker. Exits with the first
# worker's code that is not 0.
set -euo pipefail

: "${TPU:?set TPU to the name of the TPU VM}"
: "${ZONE:?set ZONE to its zone}"
folder=${FOLDER:-radonc_jax} interpreter=${PYTHON:-python3} logs=${LOGS:-tpu_logs}

workers=$(gcloud compute tpus tpu-vm describe "$TPU" --zone="$ZONE" \
  --format='value(networkEndpoints.len())')
mkdir -p "$logs"
command="cd $(printf %q "$folder") && RADONC_DISTRIBUTED=auto $(printf %q "$interpreter") -m radonc_jax.train"
for argument in "$@"; do command+=" $(printf %q "$argument")"; done

for ((worker = 0; worker < workers; worker++)); do
  rm -f "$logs/worker-$worker.exit"
  (
    status=0
    gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker="$worker" \
      --command="$command" >"$logs/worker-$worker.log" 2>&1 </dev/null || status=$?
    echo "$status" >"$logs/worker-$worker.exit"
    exit "$status"
  ) &
done
echo "$workers workers started; logs in $logs/"
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
code=0
for ((ended = 0; ended < workers; ended++)); do
  status=0
  wait -n || status=$?
  # When one fails, the others would wait for it for ever. With 75 all of them have saved and end.
  if [ "$status" -eq 75 ]; then
    [ "$code" -ne 0 ] || code=75
  elif [ "$status" -ne 0 ] && { [ "$code" -eq 0 ] || [ "$code" -eq 75 ]; }; then
    code=$status
    sleep 1
    kill $(jobs -p) 2>/dev/null || true
  fi
done
for ((worker = 0; worker < workers; worker++)); do
  echo "worker $worker: exit code $(cat "$logs/worker-$worker.exit" 2>/dev/null || echo "none (stopped)")"
done
echo "--- worker 0, last lines"
tail -n 20 "$logs/worker-0.log"
exit "$code"
