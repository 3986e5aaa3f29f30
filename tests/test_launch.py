"""The launchers: every worker runs the same command; logs and exit codes are gathered."""

import os
import subprocess
import sys

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
echo "worker $WORKER: $RADONC_DISTRIBUTED:$(printf ' <%s>' "$@")"
[ "$WORKER" != "${FAILING:-none}" ] || exit 7
[ -z "${TOLD:-}" ] || { sleep "$((2 * WORKER))"; touch "$HOSTS/saved-$WORKER"; exit 75; }
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
    arguments = ["-m", "radonc_jax.train", "--config=configs/mistral_icd.py"]
    expected = " ".join(f"<{part}>" for part in [*arguments, "--workdir=/a folder/run"])
    for worker in range(3):
        log = (tmp_path / "logs" / f"worker-{worker}.log").read_text()
        assert log == f"worker {worker}: auto: {expected}\n"
        assert f"worker {worker}: exit code 0" in result.stdout


def test_a_failing_worker_ends_the_others_and_gives_the_exit_code(tmp_path):
    result = launch(tmp_path, FAILING="1")
    assert result.returncode == 7
    assert "worker 1: exit code 7" in result.stdout


def test_workers_that_are_told_to_end_all_come_to_their_end(tmp_path):
    """With the exit code of a preemption; one that fails beside them is told before it."""
    result = launch(tmp_path, TOLD="all")
    assert result.returncode == 75
    for worker in range(3):
        assert f"worker {worker}: exit code 75" in result.stdout
        assert (tmp_path / f"saved-{worker}").exists()
    (tmp_path / "again").mkdir()
    assert launch(tmp_path / "again", TOLD="all", FAILING="2").returncode == 7


@pytest.mark.parametrize("missing", ["TPU", "ZONE"])
def test_a_missing_setting_is_named(tmp_path, missing):
    result = launch(tmp_path, **{missing: ""})
    assert result.returncode != 0 and missing in result.stderr


# Tells what it was started with, and ends as it is told.
INTERPRETER = """#!/usr/bin/env bash
echo "$JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES $JAX_PROCESS_ID"
printf '%s\\n' "$@"
exit "${CODE:-0}"
"""


def launch_host(tmp_path, *arguments, **environment):
    path = tmp_path / "an interpreter"
    path.write_text(INTERPRETER)
    path.chmod(0o755)
    inherited = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.run(
        ["bash", "launch/multi_gpu.sh", *arguments],
        cwd=ROOT,
        env=inherited | {"PYTHON": str(path)} | environment,
        capture_output=True,
        text=True,
        timeout=20,
    )


def test_a_host_starts_its_process_of_several(tmp_path):
    hosts = dict(COORDINATOR="host0:8476", NUM_HOSTS="4", HOST_INDEX="2")
    result = launch_host(tmp_path, "--config=c.py", "--workdir=/a folder/run", **hosts)
    assert result.returncode == 0, result.stderr
    expected = ["host0:8476 4 2", "-m", "radonc_jax.train", "--config=c.py"]
    assert result.stdout.splitlines() == [*expected, "--workdir=/a folder/run"]


def test_a_host_alone_joins_nobody_and_gives_its_exit_code(tmp_path):
    result = launch_host(tmp_path, "--config=c.py", CODE="9")
    assert result.returncode == 9
    assert result.stdout.splitlines()[0].strip() == ""


@pytest.mark.parametrize("missing", ["NUM_HOSTS", "HOST_INDEX"])
def test_a_host_among_several_must_know_its_place(tmp_path, missing):
    hosts = dict(COORDINATOR="host0:8476", NUM_HOSTS="4", HOST_INDEX="2") | {missing: ""}
    result = launch_host(tmp_path, **hosts)
    assert result.returncode != 0 and missing in result.stderr and not result.stdout


@pytest.mark.parametrize("variable", [None, "CI=true", "RADONC_JAX_BROWSER=required"])
def test_a_missing_browser_fails_where_it_must_be_and_is_skipped_elsewhere(tmp_path, variable):
    environment = os.environ | {"PATH": str(tmp_path), "PYTHONPATH": str(ROOT)}
    for name in ("CI", "RADONC_JAX_BROWSER", "PYTEST_ADDOPTS"):
        environment.pop(name, None)
    if variable:
        environment |= [variable.split("=")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", "tests/test_browser.py"]
        + ["-k", "screenshot"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    told = "no Chromium with its driver here (Debian: apt-get install chromium chromium-driver)"
    if variable is None:
        assert "1 skipped" in done.stdout and told in done.stdout.replace("\n", "")
        assert "error" not in done.stdout.casefold()
    else:
        assert done.returncode == 1 and f"{told}; here the page must be tested" in done.stdout


def test_continuous_integration_requires_the_browser():
    assert "export RADONC_JAX_BROWSER=required\n" in (ROOT / ".ci" / "run").read_text()
