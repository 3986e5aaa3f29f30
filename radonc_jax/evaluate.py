"""Lets a model answer the cases of a split and scores the answers, apart from training.

    python -m radonc_jax.evaluate --workdir=runs/mistral_icd [--step=best] [--split=test]
    python -m radonc_jax.evaluate --workdir=runs/mistral_icd --model=original
    python -m radonc_jax.evaluate --config=configs/mistral_icd.py --output=original

With a run folder the answers go into it, and its report is written anew once both models have
answered. With a config alone the original model answers.
"""

import sys
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from radonc_jax import loading, parallel, settings, tracking
from radonc_jax.data import cohort
from radonc_jax.decoding.scheduler import Scheduler, text_decoder
from radonc_jax.evaluation import run as evaluation
from radonc_jax.evaluation.report import write_report
from radonc_jax.tasks import select
from radonc_jax.training import step as training_step

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, without a run folder.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Run folder of `train`.")
_OUTPUT = flags.DEFINE_string("output", None, "With --config: folder for the answers.")
_STEP = flags.DEFINE_string("step", "best", '"best", "latest" or a checkpoint\'s number.')
_SPLIT = flags.DEFINE_enum("split", "test", cohort.SPLITS, "Whose cases are answered.")
_MODEL = flags.DEFINE_enum("model", "tuned", evaluation.MODELS, "Which model answers.")


def main(argv):
    del argv
    try:
        if _WORKDIR.value is not None:
            evaluate_run(Path(_WORKDIR.value), _STEP.value, _SPLIT.value, _MODEL.value)
        elif _CONFIG.value is not None and _OUTPUT.value is not None:
            config = settings.from_mapping(_CONFIG.value.to_dict())
            evaluate_original(config, _SPLIT.value, Path(_OUTPUT.value))
        else:
            raise ValueError("pass --workdir, or --config together with --output")
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        sys.exit(f"error: {error}")


def evaluate_run(workdir: Path, step: str, split: str, model: str) -> None:
    """Evaluates the tuned or the original model of a run folder.

    Raises:
      ValueError, FileNotFoundError: the run, its checkpoint, its base or its cohort is not there
        or does not fit.
    """
    parallel.initialize()
    parallel.quiet_third_parties()
    config = loading.read_settings(workdir)
    records = cohort.load_records(config.cohort, split)
    mesh = parallel.make_mesh(config.mesh)
    if model == "original":
        loaded = loading.load_original(config, mesh)
    else:
        loaded = loading.load_run(workdir, step, mesh)
    output = workdir / "evaluation" / split / model
    answer(loaded, config, records, split=split, model=model, output=output)
    both = [workdir / "evaluation" / split / name / "metrics.json" for name in evaluation.MODELS]
    if parallel.is_main_process() and all(path.is_file() for path in both):
        write_report(workdir, split)
        print(f"report: {workdir / 'report.html'}")


def evaluate_original(config: settings.Settings, split: str, output: Path) -> None:
    """Evaluates the original model of a config, without a run."""
    parallel.initialize()
    parallel.quiet_third_parties()
    records = cohort.load_records(config.cohort, split)
    loaded = loading.load_original(config, parallel.make_mesh(config.mesh))
    answer(loaded, config, records, split=split, model="original", output=output)


def answer(loaded: loading.LoadedModel, config, records, *, split, model, output: Path) -> None:
    """Decodes, scores, writes and prints."""
    scheduler = Scheduler(
        loaded.partition,
        loaded.mesh,
        batch=config.decode.batch,
        max_new_tokens=config.decode.max_new_tokens,
        stops=loaded.stops,
        context=loaded.config.max_position_embeddings,
    )
    decode = text_decoder(
        scheduler,
        loaded.tokenizer,
        loaded.trainable,
        loaded.frozen,
        progress=f"{model}, {split}",
    )
    main_process = parallel.is_main_process()
    result = evaluation.evaluate(
        decode,
        records,
        select(config.task),
        split=split,
        model=model,
        output=output if main_process else None,
        seed=config.seed,
        ceiling=cohort.load_manifest(config.cohort).get("ceiling"),
    )
    fingerprint = training_step.fingerprint(loaded.trainable)
    if not main_process:
        return
    source = {
        "step": loaded.step,
        "trained_fingerprint": fingerprint,
        "base": str(loaded.folder),
        "cohort": tracking.cohort_sha256(config.cohort),
        "environment": tracking.environment(),
    }
    tracking.write_json(output / "source.json", source)
    for task, scores in evaluation.split_tasks(result).items():
        accuracy = scores["accuracy"]
        print(
            f"{task}: accuracy {accuracy['value']:.3f} "
            f"({accuracy['low']:.3f} to {accuracy['high']:.3f}), "
            f"ROUGE-1 {scores['rouge1']['value']:.3f}, {scores['unparseable']} unparseable, "
            f"n {scores['n']}"
        )


if __name__ == "__main__":
    app.run(main)
