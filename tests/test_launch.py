"""The launchers: every worker runs the same command; logs and exit codes are gathered."""

import os
import subprocess

import pytest
from conftest import ROOT

# A stand-in for the cloud's command-line tool: three workers, whose shells run here.
GCLOUD = """#!/usr/bin/env bash
case "$*" in
  *describe*) echo 3 ;;
  *ssh*)
    for argument in "$@"; do
      case $argument in
        --worker=*) export WORKER=${argument#--worker=} ;;
        --command=*) command=${argument#--command=} ;;
      esac
    done
    cd "$HOSTS" && exec bash -c "$command" ;;
esac
"""
PYTHON = """#!/usr/bin/env bash
echo "worker $WORKER: $RADONC_DISTRIBUTED: $*"
[ "$WORKER" != "${FAILING:-none}" ] || exit 7
[ -z "${FAILING:-}" ] || sleep 60
"""


def launch(tmp_path, *arguments, **environment):
    for name, text in (("gcloud", GCLOUD), ("python", PYTHON)):
        path = tmp_path / name
        path.write_text(text)
        path.chmod(0o755)
    (tmp_path / "radonc_jax").mkdir()
    return subprocess.run(
        ["bash", "launch/tpu_pod.sh", *arguments],
        cwd=ROOT,
        env=os.environ
        | {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "TPU": "pod",
            "ZONE": "zone",
            "HOSTS": str(tmp_path),
            "PYTHON": str(tmp_path / "python"),
            "LOGS": str(tmp_path / "logs"),
        }
        | environment,
        capture_output=True,
        text=True,
        timeout=50,
    )


def test_pod_runs_one_command_on_every_worker(tmp_path):
    result = launch(tmp_path, "--config=configs/mistral_icd.py", "--workdir=/a folder/run")
    assert result.returncode == 0, result.stderr
    for worker in range(3):
        log = (tmp_path / "logs" / f"worker-{worker}.log").read_text()
        expected = "-m radonc_jax.train --config=configs/mistral_icd.py --workdir=/a folder/run"
        assert log == f"worker {worker}: auto: {expected}\n"
        assert f"worker {worker}: exit code 0" in result.stdout


def test_a_failing_worker_ends_the_others_and_gives_the_exit_code(tmp_path):
    result = launch(tmp_path, FAILING="1")
    assert result.returncode == 7
    assert "worker 1: exit code 7" in result.stdout


@pytest.mark.parametrize("missing", ["TPU", "ZONE"])
def test_a_missing_setting_is_named(tmp_path, missing):
    result = launch(tmp_path, **{missing: ""})
    assert result.returncode != 0 and missing in result.stderr
