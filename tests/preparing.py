"""Runs `prepare` within the test process: a process of its own takes seconds to start."""

import json

from absl import flags

from radonc_jax import command, prepare

NAMES = [flag.name for flag in flags.FLAGS.flags_by_module_dict()[prepare.__name__]]


def run_prepare(folder, source, *options):
    """Makes folder/cohort of `source`; (manifest, None), or (None, message of the error)."""
    for name in NAMES:
        flags.FLAGS[name].unparse()
    flags.FLAGS(["prepare", f"--input={source}", f"--output={folder / 'cohort'}", *options])
    try:
        command.guard(prepare.main)(["prepare"])
    except SystemExit as error:
        assert isinstance(error.code, str) and error.code.startswith("error: ")
        assert len(error.code.splitlines()) == 1
        return None, error.code
    return json.loads((folder / "cohort" / "manifest.json").read_text()), None
