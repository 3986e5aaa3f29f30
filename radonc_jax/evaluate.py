"""Lets a model answer the cases of a split and scores the answers, apart from training.

    python -m radonc_jax.evaluate --workdir=runs/mistral_icd --all
    python -m radonc_jax.evaluate --workdir=runs/mistral_icd [--step=best] [--split=test]
    python -m radonc_jax.evaluate --workdir=runs/mistral_icd --model=original
    python -m radonc_jax.evaluate --workdir=runs/mistral_icd --model=original --examples=5
    python -m radonc_jax.evaluate --workdir=runs/mistral_icd --constrained=table
    python -m radonc_jax.evaluate --workdir=runs/mistral_icd --robustness
    python -m radonc_jax.evaluate --workdir=runs/mistral_icd --base=/models/Mistral-7B-v0.1
    python -m radonc_jax.evaluate --config=configs/mistral_icd.py [--output=original]

With a run folder the answers go into it, and its report is written anew once both models have
answered. A killed evaluation, started again, goes on with the answers that it has. --all asks
everything that the report has room for, of both models and with the base loaded once: the test
split in free text, from closed sets, with changed texts and, of the original, with examples in the
prompt; and the validation split, which conformal sets need, in the same ways. A part that cannot
be asked is told, the others are.

The other flags ask one thing each. --examples shows the original model that many training cases
with their answers in each prompt. With --constrained the answers come from closed sets (modality:
its four labels, each scored; icd: the codes of the code table, or of the cohort). Both lie in
folders of their own. --robustness lets a run's model answer changed texts too. A run's folder that
has travelled is enough, with the base: it holds a copy of its cohort, and --base says where the
base lies here. With a config alone the original model answers, and its scores are printed;
--output names a folder for its answers.
"""

import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
from absl import flags
from jax.sharding import Mesh
from ml_collections import config_flags

from radonc_jax import command, loading, parallel, settings
from radonc_jax.answering import answer_source, answer_split, constraints
from radonc_jax.data import cohort
from radonc_jax.data.batches import prompt_room
from radonc_jax.decoding.constrain import CODES
from radonc_jax.decoding.journal import Journal
from radonc_jax.decoding.scheduler import Scheduler
from radonc_jax.decoding.text import TextDecoder
from radonc_jax.evaluation import robustness
from radonc_jax.evaluation import run as evaluation
from radonc_jax.evaluation.report import describe, write_report
from radonc_jax.models import huggingface, lora
from radonc_jax.tasks import WithExamples, choose_examples, select
from radonc_jax.training import step as training_step

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, without a run folder.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Run folder of `train`.")
_OUTPUT = flags.DEFINE_string("output", None, "With --config: folder for the answers, if wanted.")
_ALL = flags.DEFINE_bool("all", False, "With --workdir: ask all that the report has room for.")
_STEP = flags.DEFINE_string("step", "best", '"best", "latest" or a checkpoint\'s number.')
_SPLIT = flags.DEFINE_enum("split", "test", cohort.SPLITS, "Whose cases are answered.")
_EXAMPLES = flags.DEFINE_integer(
    "examples",
    None,
    "Training cases shown in each prompt, of the original model. With --all 5 if not given, and 0 "
    "leaves this part out; else none if not given.",
    lower_bound=0,
)
_ROBUSTNESS = flags.DEFINE_bool(
    "robustness", False, "Let the model answer changed texts too: flipped sides, synonyms ..."
)
_CONSTRAINED = flags.DEFINE_enum(
    "constrained",
    "",
    ["", *CODES],
    "Answers from closed sets; where the ICD-10-CM codes are from. With --all what the run's "
    'config says if not given, or "table".',
)
_BASE = flags.DEFINE_string(
    "base", None, "With --workdir: the base's folder here, where it is not the config's."
)
_MODEL = flags.DEFINE_enum("model", "tuned", evaluation.MODELS, "Which model answers.")

EXAMPLES = 5  # with --all
# Answers to changed texts, as token ids. It stays: what was asked is not asked again.
ROBUSTNESS_JOURNAL = ".robustness_answers.jsonl"


@dataclass(frozen=True)
class Part:
    """One thing to ask: one model, one split, in one way; its answers lie in one folder.

    Attributes:
      split, model: whose cases, and "tuned" or "original".
      examples: training cases that each prompt shows.
      constrained: where the codes are from that answers are held to; "" for free answers.
      robustness: whether changed texts are asked too.

    Raises:
      ValueError: the report has no place for what would be answered.
    """

    split: str
    model: str
    examples: int = 0
    constrained: str = ""
    robustness: bool = False

    def __post_init__(self):
        if self.examples and (self.model != "original" or self.robustness):
            raise ValueError("--examples are for --model=original, and without --robustness")
        if self.constrained and (self.examples or self.robustness):
            raise ValueError("--constrained goes without --examples and --robustness")

    @property
    def name(self) -> str:
        """Of the answers and of their folder, one of `evaluation.VARIANTS`."""
        asked = "original_examples" if self.examples else self.model
        return asked + evaluation.CONSTRAINED * bool(self.constrained)


def main():
    if _WORKDIR.value is not None and _CONFIG.value is not None:
        raise ValueError("pass --workdir or --config, not both: a run has its own config")
    if _WORKDIR.value is None and _CONFIG.value is None:
        raise ValueError("pass --workdir of a run, or --config for the original model")
    if _WORKDIR.value is None and (_ALL.value or _EXAMPLES.value or _ROBUSTNESS.value):
        raise ValueError("--all, --examples and --robustness need the --workdir of a run")
    part = None
    if not _ALL.value:
        part = Part(
            _SPLIT.value,
            _MODEL.value if _CONFIG.value is None else "original",
            examples=_EXAMPLES.value or 0,
            constrained=_CONSTRAINED.value,
            robustness=_ROBUSTNESS.value,
        )
    else:
        named = [flag for flag in (_SPLIT, _MODEL, _ROBUSTNESS, _OUTPUT) if flag.present]
        if named:
            raise ValueError(
                f"--all goes without {' and '.join(f'--{flag.name}' for flag in named)}: it asks "
                "everything, and writes into the run folder"
            )
    parallel.initialize()
    parallel.quiet_third_parties()
    if _CONFIG.value is not None:
        config = settings.from_mapping(_CONFIG.value.to_dict())
        evaluate_original(config, part, None if _OUTPUT.value is None else Path(_OUTPUT.value))
        return
    workdir = Path(_WORKDIR.value)
    config = loading.read_settings(workdir, _BASE.value)
    parts = [part]
    if part is None:
        examples = EXAMPLES if _EXAMPLES.value is None else _EXAMPLES.value
        parts = all_parts(config, _CONSTRAINED.value, examples)
    evaluate_run(workdir, config, _STEP.value, parts)


def all_parts(config: settings.Settings, constrained: str, examples: int) -> list[Part]:
    """Everything that the report of a run's test split has room for.

    The tuned model comes first, and last what is likeliest to fail: prompts with examples, which
    may be too long. The validation split is asked in all the ways in which the test split is, for
    it calibrates each of them.

    Args:
      config: of the run.
      constrained: "table" or "cohort"; "" for what `config` says, so that the closed sets of
        `train` stay, or "table".
      examples: in a prompt; 0 leaves these prompts out.
    """
    words = [""]
    if has_closed_sets(config):
        words.append(constrained or config.decode.constrained or "table")
    elif parallel.is_main_process():
        print(f"task {config.task!r} is answered in free text: closed sets are left out")
    splits = ("test", "validation")
    parts = [
        Part(split, model, constrained=word, robustness=split == "test" and not word)
        for model in ("tuned", "original")
        for split in splits
        for word in words
    ]
    if examples:
        parts += [Part(split, "original", examples=examples) for split in splits]
    return parts


def evaluate_run(
    workdir: Path, config: settings.Settings, step: str, parts: Sequence[Part]
) -> None:
    """Asks a run's models, one part after the other, and writes the report once at the end.

    Where there are several parts, one that fails is told and the others are asked all the same. An
    error that is no ValueError ends it at once: a full disk has no room for the other parts either,
    and of several processes one alone may have met it.

    Args:
      workdir, config: the run.
      step: of the tuned model's checkpoint.
      parts: those of one model side by side, the tuned one's first.

    Raises:
      ValueError, FileNotFoundError: the run, its checkpoint, its base or its cohort is not there
        or does not fit; or, at the end, some of several parts failed.
    """
    check_answers(config, parts)
    config = replace(config, cohort=str(loading.find_cohort(config, workdir)))
    records = {
        split: cohort.load_records(config.cohort, split, for_run=True)
        for split in dict.fromkeys(part.split for part in parts)
    }
    mesh = loading.run_mesh(config)
    loaded, failed = None, []
    for model, own in itertools.groupby(parts, lambda part: part.model):
        if loaded is not None and loaded.lora is not None:
            loaded = untuned(loaded, config)
        else:
            loaded = None  # a whole model: there may be no room for two
            loaded = load(model, workdir, config, step, mesh)
            scheduler = loaded.scheduler(config.decode.batch, config.decode.max_new_tokens)
            closed_sets = functools.cache(functools.partial(constraints, config, loaded.tokenizer))
        for part in own:
            output = workdir / "evaluation" / part.split / part.name
            try:
                answer(part, loaded, scheduler, config, records[part.split], output, closed_sets)
            except ValueError as error:
                if len(parts) == 1:
                    raise
                failed.append(f"{part.split}/{part.name}")
                if parallel.is_main_process():
                    print(f"{failed[-1]}: {' '.join(str(error).split())}", file=sys.stderr)
    split = parts[0].split
    both = [workdir / "evaluation" / split / name / "metrics.json" for name in evaluation.MODELS]
    if parallel.is_main_process() and all(path.is_file() for path in both):
        # The run's own report is of the test split; others lie beside their answers.
        folder = workdir if split == "test" else workdir / "evaluation" / split
        print(describe(write_report(workdir, split, folder), folder))
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(parts)} parts failed, each for the reason above: "
            f"{', '.join(failed)}. The others are kept, and not asked again by the same command"
        )


def evaluate_original(config: settings.Settings, part: Part, output: Path | None) -> None:
    """Evaluates the original model of a config, without a run."""
    check_answers(config, [part])
    records = cohort.load_records(config.cohort, part.split)
    loaded = loading.load_original(config, parallel.make_mesh(config.mesh))
    scheduler = loaded.scheduler(config.decode.batch, config.decode.max_new_tokens)
    closed_sets = functools.partial(constraints, config, loaded.tokenizer, for_run=False)
    answer(part, loaded, scheduler, config, records, output, closed_sets)


def check_answers(config: settings.Settings, parts: Sequence[Part]) -> None:
    """ValueError for a run on plain text, which has no questions, or closed sets of free text."""
    if config.task == "text":
        raise ValueError('task="text" has no questions to answer, so there is nothing to evaluate')
    if any(part.constrained for part in parts) and not has_closed_sets(config):
        raise ValueError(f"task {config.task!r} is answered in free text: leave --constrained out")


def has_closed_sets(config: settings.Settings) -> bool:
    return any(task.has_classes for task in select(config.task))


def load(
    model: str, workdir: Path, config: settings.Settings, step: str, mesh: Mesh
) -> loading.LoadedModel:
    """The tuned or the original model of a run; errors as `loading.load_run`."""
    if model == "tuned":
        return loading.load_run(workdir, step, mesh, model=config.model)
    original = loading.load_original(config, mesh, workdir)
    if config.adapter is None:
        return original
    compute = huggingface.as_dtype(config.precision.compute)
    partition = lora.partition(original.config, config.adapter, compute, config.precision.quantized)
    # The same arrays in the same order: an adapter gives them other paths only.
    base = jax.tree.unflatten(
        jax.tree.structure(partition.frozen), jax.tree.leaves(original.trainable)
    )
    return untuned(replace(original, lora=config.adapter, partition=partition, frozen=base), config)


def untuned(loaded: loading.LoadedModel, config: settings.Settings) -> loading.LoadedModel:
    """The original model of a run that trains an adapter: its base under an adapter that does
    nothing. So `train` asks it too, and either keeps what the other has answered."""
    fresh = loading.new_adapter(loaded.partition, loaded.frozen, config.seed, loaded.mesh)
    return replace(loaded, trainable=fresh, step=None)


def answer(
    part: Part,
    loaded: loading.LoadedModel,
    scheduler: Scheduler,
    config: settings.Settings,
    records: Sequence,
    output: Path | None,
    closed_sets: Callable[[str], dict],
) -> None:
    """Decodes, scores and prints one part; writes too where `output` names a folder.

    Args:
      part: what is asked.
      loaded, scheduler: the model.
      config, records: the run's settings, and the cases of the part's split.
      closed_sets: `constraints` by the word that says where codes are from.

    Raises:
      ValueError: it cannot be asked: a prompt, or an answer of the closed set, is too long.
    """
    tasks, origin, closed = select(config.task), {}, None
    if part.examples:
        training = cohort.load_records(config.cohort, "train", for_run=True)
        tasks = tuple(
            WithExamples(task, choose_examples(task, training, part.examples, config.seed))
            for task in tasks
        )
        origin = {"examples": part.examples}
    if part.constrained:
        closed = closed_sets(part.constrained)
        origin = {"constrained": part.constrained}
    origin |= {
        "step": loaded.step,
        "trained_fingerprint": training_step.fingerprint(loaded.trainable),
        "base_fingerprint": training_step.fingerprint(loaded.frozen),
        "base": str(loaded.folder),
    } | loading.arithmetic(loaded.config, loaded.lora)
    decoder = TextDecoder(
        scheduler,
        loaded.tokenizer,
        loaded.trainable,
        loaded.frozen,
        config.batch.over_length,
        progress=f"{part.name}, {part.split}",
        # Prompts with examples are another kind than those that were trained.
        trained=None if part.examples else prompt_room(config.batch.sequence_length),
    )
    result = answer_split(
        decoder,
        records,
        tasks,
        split=part.split,
        model=part.name,
        output=output,
        config=config,
        origin=origin,
        constrained=closed,
    )
    rates = {}
    if part.robustness:
        # Only the main one has written them, and on its own disk perhaps.
        given = parallel.on_main(
            lambda: evaluation.read_predictions(output / evaluation.PREDICTIONS)
        )
        journal = Journal(output / ROBUSTNESS_JOURNAL, answer_source(decoder, config, origin))
        rates = robustness.probe_tasks(
            replace(decoder, journal=journal, progress=f"{part.name}, changed texts"),
            records,
            tasks,
            given,
            output if parallel.is_main_process() else None,
            fits=decoder.reads_whole,
            seed=config.seed,
        )
        journal.close()
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
    for task, found in rates.items():
        print(robustness.describe(task, found))
    if output is not None:
        print(f"answers and scores: {output}")


if __name__ == "__main__":
    command.run(main)
