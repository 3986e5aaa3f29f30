"""Writes a run's result for other programs: a PEFT adapter folder, or a merged model folder.

    python -m radonc_jax.export --workdir=runs/icd --format=peft --output=icd-adapter
    python -m radonc_jax.export --workdir=runs/icd --format=merged --output=icd-model

An adapter belongs to its base and loads with peft or vLLM. A merged folder stands alone: every
adapted kernel is base + update, added in float32 and rounded once to the dtype that the base is
stored in; every other tensor is copied bit for bit. What the rounding costs is measured: some
validation cases are answered by base and adapter and by the merged model, and `export.json` in the
folder says how often they agree. A run that trained the whole model has no adapter and can only be
written merged. A run's folder that has travelled is enough, with the base: --base says where that
lies here.
"""

from pathlib import Path

from absl import flags

from radonc_jax import command, exporting, parallel

_WORKDIR = flags.DEFINE_string("workdir", None, "Run folder, from `train`.")
_FORMAT = flags.DEFINE_enum("format", None, ["peft", "merged"], "What to write.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder to be made.")
_STEP = flags.DEFINE_string("step", "best", "Checkpoint: best, latest or its number.")
_CHECK_CASES = flags.DEFINE_integer(
    "check_cases",
    50,
    "Validation cases that base and adapter, and the merged model, answer for comparison; 0: none.",
    lower_bound=0,
)
_BASE = flags.DEFINE_string(
    "base", None, "The base's folder here, where it is not the config's; an adapter names it."
)
flags.mark_flags_as_required(["workdir", "format", "output"])


def main() -> None:
    parallel.quiet_third_parties()
    exporting.export(
        Path(_WORKDIR.value),
        _FORMAT.value,
        Path(_OUTPUT.value),
        _STEP.value,
        _CHECK_CASES.value,
        _BASE.value,
    )


if __name__ == "__main__":
    command.run(main)
