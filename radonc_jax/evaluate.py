"""Lets a model answer the cases of a split and scores the answers, apart from training.

    python -m radonc_jax.evaluate --workdir=runs/mistral_icd [--step=best] [--split=test]
    python -m radonc_jax.evaluate --workdir=runs/mistral_icd --model=original
    python -m radonc_jax.evaluate --workdir=runs/mistral_icd --model=original --examples=5
    python -m radonc_jax.evaluate --workdir=runs/mistral_icd --constrained=table
    python -m radonc_jax.evaluate --workdir=runs/mistral_icd --robustness
    python -m radonc_jax.evaluate --workdir=runs/mistral_icd --base=/models/Mistral-7B-v0.1
    python -m radonc_jax.evaluate --config=configs/mistral_icd.py [--output=original]

With a run folder the answers go into it, and its report is written anew once both models have
answered. A killed evaluation, started again, goes on with the answers that it has. --examples
shows the original model that many training cases with their answers in each prompt. With
--constrained the answers come from closed sets (modality: its four labels, each scored; icd: the
codes of the code table, or of the cohort). Both lie in folders of their own. --robustness lets a
run's model answer changed texts too. A run's folder that has travelled is enough, with the base:
it holds a copy of its cohort, and --base says where the base lies here. With a config alone the
original model answers, and its scores are printed; --output names a folder for its answers.
"""

from dataclasses import replace
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from radonc_jax import command, loading, parallel, settings
from radonc_jax.answering import answer_split, constraints, variant
from radonc_jax.data import cohort
from radonc_jax.data.batches import prompt_room
from radonc_jax.decoding.constrain import CODES
from radonc_jax.decoding.text import TextDecoder
from radonc_jax.evaluation import robustness
from radonc_jax.evaluation import run as evaluation
from radonc_jax.evaluation.report import describe, write_report
from radonc_jax.tasks import WithExamples, choose_examples, select
from radonc_jax.training import step as training_step

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, without a run folder.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Run folder of `train`.")
_OUTPUT = flags.DEFINE_string("output", None, "With --config: folder for the answers, if wanted.")
_STEP = flags.DEFINE_string("step", "best", '"best", "latest" or a checkpoint\'s number.')
_SPLIT = flags.DEFINE_enum("split", "test", cohort.SPLITS, "Whose cases are answered.")
_EXAMPLES = flags.DEFINE_integer(
    "examples", 0, "Training cases shown in each prompt, of the original model.", lower_bound=0
)
_ROBUSTNESS = flags.DEFINE_bool(
    "robustness", False, "Let the model answer changed texts too: flipped sides, synonyms ..."
)
_CONSTRAINED = flags.DEFINE_enum(
    "constrained", "", ["", *CODES], "Answers from closed sets; where the ICD-10-CM codes are from."
)
_BASE = flags.DEFINE_string(
    "base", None, "With --workdir: the base's folder here, where it is not the config's."
)
_MODEL = flags.DEFINE_enum("model", "tuned", evaluation.MODELS, "Which model answers.")


def main():
    if _WORKDIR.value is not None and _CONFIG.value is not None:
        raise ValueError("pass --workdir or --config, not both: a run has its own config")
    if _WORKDIR.value is not None:
        evaluate_run(
            Path(_WORKDIR.value),
            _STEP.value,
            _SPLIT.value,
            _MODEL.value,
            examples=_EXAMPLES.value,
            with_robustness=_ROBUSTNESS.value,
        )
    elif _CONFIG.value is not None:
        if _EXAMPLES.value or _ROBUSTNESS.value:
            raise ValueError("--examples and --robustness need the --workdir of a run")
        config = settings.from_mapping(_CONFIG.value.to_dict())
        output = None if _OUTPUT.value is None else Path(_OUTPUT.value)
        evaluate_original(config, _SPLIT.value, output)
    else:
        raise ValueError("pass --workdir of a run, or --config for the original model")


def evaluate_run(
    workdir: Path,
    step: str,
    split: str,
    model: str,
    *,
    examples: int = 0,
    with_robustness: bool = False,
) -> None:
    """Evaluates the tuned or the original model of a run folder.

    With `examples` the original model sees that many training cases in its prompts, and its answers
    lie in a folder of their own.

    Raises:
      ValueError, FileNotFoundError: the run, its checkpoint, its base or its cohort is not there
        or does not fit.
    """
    if examples and (model != "original" or with_robustness):
        raise ValueError("--examples are for --model=original, and without --robustness")
    if _CONSTRAINED.value and (examples or with_robustness):
        raise ValueError("--constrained goes without --examples and --robustness")
    parallel.initialize()
    parallel.quiet_third_parties()
    config = loading.read_settings(workdir, _BASE.value)
    check_answers(config)
    config = replace(config, cohort=str(loading.find_cohort(config, workdir)))
    records = cohort.load_records(config.cohort, split, for_run=True)
    mesh = loading.run_mesh(config)
    if model == "original":
        loaded = loading.load_original(config, mesh, workdir)
    else:
        loaded = loading.load_run(workdir, step, mesh, model=config.model)
    if examples:
        model = "original_examples"
    constrained = evaluation.CONSTRAINED if _CONSTRAINED.value else ""
    output = workdir / "evaluation" / split / (model + constrained)
    answer(
        loaded,
        config,
        records,
        split=split,
        model=model,
        output=output,
        examples=examples,
        with_robustness=with_robustness,
    )
    both = [workdir / "evaluation" / split / name / "metrics.json" for name in evaluation.MODELS]
    if parallel.is_main_process() and all(path.is_file() for path in both):
        # The run's own report is of the test split; others lie beside their answers.
        folder = workdir if split == "test" else workdir / "evaluation" / split
        print(describe(write_report(workdir, split, folder), folder))


def evaluate_original(config: settings.Settings, split: str, output: Path | None) -> None:
    """Evaluates the original model of a config, without a run."""
    parallel.initialize()
    parallel.quiet_third_parties()
    check_answers(config)
    records = cohort.load_records(config.cohort, split)
    loaded = loading.load_original(config, parallel.make_mesh(config.mesh))
    answer(loaded, config, records, split=split, model="original", output=output, for_run=False)


def check_answers(config: settings.Settings) -> None:
    """ValueError for a run on plain text, which has no questions."""
    if config.task == "text":
        raise ValueError('task="text" has no questions to answer, so there is nothing to evaluate')


def answer(
    loaded: loading.LoadedModel,
    config,
    records,
    *,
    split,
    model,
    output: Path | None,
    examples: int = 0,
    with_robustness: bool = False,
    for_run: bool = True,
) -> None:
    """Decodes, scores and prints; writes too where `output` names a folder. `for_run` is False for
    a config that belongs to no run."""
    tasks, origin = select(config.task), {}
    if examples:
        training = cohort.load_records(config.cohort, "train", for_run=True)
        tasks = tuple(
            WithExamples(task, choose_examples(task, training, examples, config.seed))
            for task in tasks
        )
        origin = {"examples": examples}
    closed = None
    if _CONSTRAINED.value:
        closed = constraints(config, loaded.tokenizer, _CONSTRAINED.value, for_run=for_run)
        if not closed:
            raise ValueError(
                f"task {config.task!r} is answered in free text: leave --constrained out"
            )
        origin = {"constrained": _CONSTRAINED.value}
    decoder = TextDecoder(
        loaded.scheduler(config.decode.batch, config.decode.max_new_tokens),
        loaded.tokenizer,
        loaded.trainable,
        loaded.frozen,
        config.batch.over_length,
        progress=f"{model}, {split}",
        # Prompts with examples are another kind than those that were trained.
        trained=None if examples else prompt_room(config.batch.sequence_length),
    )
    result = answer_split(
        decoder,
        records,
        tasks,
        split=split,
        model=variant(model, closed),
        output=output,
        config=config,
        origin=origin
        | {
            "step": loaded.step,
            "trained_fingerprint": training_step.fingerprint(loaded.trainable),
            "base_fingerprint": training_step.fingerprint(loaded.frozen),
            "base": str(loaded.folder),
        }
        | loading.arithmetic(loaded.config, loaded.lora),
        constrained=closed,
    )
    if with_robustness:
        # Only the main one has written them, and on its own disk perhaps.
        given = parallel.on_main(
            lambda: evaluation.read_predictions(output / evaluation.PREDICTIONS)
        )
        rates = robustness.probe_tasks(
            decoder,
            records,
            tasks,
            given,
            output if parallel.is_main_process() else None,
            fits=decoder.reads_whole,
            seed=config.seed,
        )
    if not parallel.is_main_process():
        return
    for task, scores in evaluation.split_tasks(result).items():
        accuracy = scores["accuracy"]
        print(
            f"{task}: accuracy {accuracy['value']:.3f} "
            f"({accuracy['low']:.3f} to {accuracy['high']:.3f}), "
            f"ROUGE-1 {scores['rouge1']['value']:.3f}, {scores['unparseable']} unparseable, "
            f"n {scores['n']}"
        )
    for task, found in rates.items() if with_robustness else ():
        print(robustness.describe(task, found))
    if output is not None:
        print(f"answers and scores: {output}")


if __name__ == "__main__":
    command.run(main)
