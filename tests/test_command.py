"""What a user gets wrong is told in one line, whatever the command."""

import subprocess
import sys

import pytest
from conftest import ROOT

PROGRAM = """
from absl import flags
from radonc_jax import command

flags.DEFINE_integer("number", 1, "A number.")
flags.DEFINE_enum("codes", "", ["", "table", "cohort"], "A choice.")

def main():
    {body}

command.run(main, stopped="stopped: go on with the same command")
"""


def run(body, *arguments):
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(body=body), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise ValueError('two\\n lines')", "two lines"),
        ("raise FloatingPointError('a loss')", "a loss"),
        ("raise FileNotFoundError('no run there')", "no run there"),
        ("open('/proc/none/file', 'w')", "/proc/none/file: No such file or directory"),
        ("raise OSError(28, 'No space left on device')", "No space left on device"),
    ],
    ids=["value", "not finite", "own words", "of the system", "disk full"],
)
def test_an_error_is_one_line(body, message):
    result = run(body)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"error: {message}\n"


def test_a_bug_of_ours_keeps_its_traceback():
    result = run("raise AssertionError('ours')")
    assert result.returncode == 1 and "Traceback" in result.stderr


def test_an_argument_that_is_no_flag_is_refused():
    result = run("print('ran')", "--number=2", "extra")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "error: unexpected argument 'extra'; every setting is a --flag=value\n"


@pytest.mark.parametrize("arguments", [["--codes"], ["--codes", "--number=2"]])
def test_a_choice_without_a_value_is_told_its_values(arguments):
    result = run("print('ran')", *arguments)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "error: --codes needs a value: --codes=table or --codes=cohort\n"
    assert run("print(flags.FLAGS.codes)", "--codes", "table").stdout == "table\n"


@pytest.mark.parametrize("given", [["--config=configs/mistral.py"], ["--config", "configs"]])
def test_a_config_file_that_is_not_there_is_told_with_those_that_are(given):
    defined = "from ml_collections import config_flags\nconfig_flags.DEFINE_config_file('config')\n"
    program = defined + PROGRAM.format(body="print('ran')")
    done = subprocess.run(
        [sys.executable, "-c", program, *given], cwd=ROOT, capture_output=True, text=True
    )
    path = given[-1].removeprefix("--config=")
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: --config={path}: no such file in {ROOT}; ")
    assert f"{ROOT}/configs has llama2_all.py, llama2_icd.py, " in done.stderr


def test_an_interruption_is_no_traceback():
    result = run("raise KeyboardInterrupt")
    assert (result.returncode, result.stderr) == (130, "stopped: go on with the same command\n")
