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

import contextlib
import itertools
import sys
from collections.abc import Mapping, Sequence
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
MOST_TOLD = 500  # characters of the error of a part
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
    if _CONFIG.value is None and _OUTPUT.present:
        raise ValueError("--output goes with --config: answers of a run lie in its folder")
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
        named = [flag for flag in (_SPLIT, _MODEL, _ROBUSTNESS) if flag.present]
        if named:
            raise ValueError(
                f"--all goes without {' and '.join(f'--{flag.name}' for flag in named)}: it asks "
                "everything"
            )
    parallel.initialize()
    parallel.quiet_third_parties()
    if _CONFIG.value is not None:
        config = settings.from_mapping(_CONFIG.value.to_dict())
        evaluate_original(config, part, None if _OUTPUT.value is None else Path(_OUTPUT.value))
        return
    workdir = Path(_WORKDIR.value)
    config = loading.read_settings(workdir, _BASE.value)
    check_answers(config)
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
    """Asks a run's models, one part after the other, and writes the report at the end.

    Where there are several parts, one that fails is told and the others are asked all the same: a
    prompt is too long, cases are not there, there is not the memory for it. Of several processes
    one alone may meet what is not found before anything is run; then all of them end.

    Args:
      workdir, config: the run.
      step: of the tuned model's checkpoint.
      parts: those of one model side by side, the tuned one's first.

    Raises:
      ValueError, FileNotFoundError: the run, its checkpoint, its base or its cohort is not there
        or does not fit; or, at the end, some of several parts failed.
    """
    check_closed_sets(config, parts)
    config = replace(config, cohort=str(loading.find_cohort(config, workdir)))
    mesh = loading.run_mesh(config)
    model, failed = None, []
    for name, own in itertools.groupby(parts, lambda part: part.model):
        if model is not None and model.loaded.lora is not None:
            model = model.untuned(config)
        else:
            model = None  # a whole model: there may be no room for two
            model = Model.of_run(name, workdir, config, step, mesh)
        for part in own:
            output = workdir / "evaluation" / part.split / part.name
            try:
                answer(prepare(model, part, config), config, output)
            except Exception as error:
                if len(parts) == 1:
                    raise
                if not _spares_others(error):
                    with contextlib.suppress(Exception):  # of a full disk, too
                        report(workdir, parts[0].split)
                    raise
                failed.append(f"{part.split}/{part.name}")
                if parallel.is_main_process():
                    told = " ".join(str(error).split())[:MOST_TOLD]
                    print(f"{failed[-1]}: {told}", file=sys.stderr, flush=True)
    report(workdir, parts[0].split)
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(parts)} parts failed, each for the reason above: "
            f"{', '.join(failed)}. The others are kept, and not asked again by the same command"
        )


class Unasked(ValueError):
    """A part that cannot be asked, by what all processes know before any of them runs it."""


def _spares_others(error: Exception) -> bool:
    """Whether the other parts can be asked after this one's error: all processes have it, or there
    is one alone."""
    if isinstance(error, Unasked):
        return True
    if parallel.several_processes():
        return False
    if isinstance(error, jax.errors.JaxRuntimeError):
        return "RESOURCE_EXHAUSTED" in str(error)
    return isinstance(error, ValueError)


def report(workdir: Path, split: str) -> None:
    """Writes a run's report anew where both models have answered the split."""
    both = [workdir / "evaluation" / split / name / "metrics.json" for name in evaluation.MODELS]
    if parallel.is_main_process() and all(path.is_file() for path in both):
        # The run's own report is of the test split; others lie beside their answers.
        folder = workdir if split == "test" else workdir / "evaluation" / split
        print(describe(write_report(workdir, split, folder), folder))


def evaluate_original(config: settings.Settings, part: Part, output: Path | None) -> None:
    """Evaluates the original model of a config, without a run."""
    check_answers(config)
    check_closed_sets(config, [part])
    loaded = loading.load_original(config, parallel.make_mesh(config.mesh))
    model = Model.of_loaded(loaded, config)
    answer(prepare(model, part, config, for_run=False), config, output)


def check_answers(config: settings.Settings) -> None:
    """ValueError for a run on plain text, which has no questions."""
    if config.task == "text":
        raise ValueError('task="text" has no questions to answer, so there is nothing to evaluate')


def check_closed_sets(config: settings.Settings, parts: Sequence[Part]) -> None:
    """ValueError for closed sets of free text."""
    if any(part.constrained for part in parts) and not has_closed_sets(config):
        raise ValueError(f"task {config.task!r} is answered in free text: leave --constrained out")


def has_closed_sets(config: settings.Settings) -> bool:
    """Whether a task of the run has classes that answers can be held to."""
    return any(task.has_classes for task in select(config.task))


@dataclass(frozen=True)
class Model:
    """A model that answers, made ready once for all its parts.

    Attributes:
      loaded, scheduler: its arrays, and its compiled programs.
      origin: what an answer depends on by it, for `answer_split`.
    """

    loaded: loading.LoadedModel
    scheduler: Scheduler
    origin: Mapping

    @classmethod
    def of_run(
        cls, name: str, workdir: Path, config: settings.Settings, step: str, mesh: Mesh
    ) -> "Model":
        """The "tuned" or "original" one of a run; errors as `loading.load_run`."""
        if name == "tuned":
            return cls.of_loaded(loading.load_run(workdir, step, mesh, model=config.model), config)
        return cls.of_loaded(loading.load_original(config, mesh, workdir), config)

    @classmethod
    def of_loaded(cls, loaded: loading.LoadedModel, config: settings.Settings) -> "Model":
        scheduler = loaded.scheduler(config.decode.batch, config.decode.max_new_tokens)
        return cls(loaded, scheduler, _origin(loaded))

    def untuned(self, config: settings.Settings) -> "Model":
        """The original model of a run that trains an adapter, from its tuned one: with the same
        base and the same compiled programs."""
        loaded = loading.untuned(self.loaded, config.seed)
        return replace(self, loaded=loaded, origin=_origin(loaded))


def _origin(loaded: loading.LoadedModel) -> dict:
    return {
        "step": loaded.step,
        "trained_fingerprint": training_step.fingerprint(loaded.trainable),
        "base_fingerprint": training_step.fingerprint(loaded.frozen),
        "base": str(loaded.folder),
    } | loading.arithmetic(loaded.config, loaded.lora)


@dataclass(frozen=True)
class Prepared:
    """A part that can be asked.

    Attributes:
      part, records, tasks: what is asked.
      decoder: that answers.
      constrained: closed sets by task; None for free answers.
      origin: what an answer depends on, for `answer_split`.
    """

    part: Part
    records: Sequence
    tasks: Sequence
    decoder: TextDecoder
    constrained: Mapping | None
    origin: Mapping


def prepare(
    model: Model, part: Part, config: settings.Settings, *, for_run: bool = True
) -> Prepared:
    """All that a part needs before anything is run; each process reads it from its own disk.

    Args:
      for_run: as `cohort.load_split` has it.

    Raises:
      Unasked: in all processes, where one has not the cases, or a prompt, or an answer of a closed
        set, is too long.
    """
    loaded, found = model.loaded, []

    def read() -> None:
        tasks, origin, closed = select(config.task), dict(model.origin), None
        records = cohort.load_records(config.cohort, part.split, for_run=for_run)
        if part.examples:
            training = cohort.load_records(config.cohort, "train", for_run=for_run)
            tasks = tuple(
                WithExamples(task, choose_examples(task, training, part.examples, config.seed))
                for task in tasks
            )
            origin["examples"] = part.examples
        if part.constrained:
            closed = constraints(config, loaded.tokenizer, part.constrained, for_run=for_run)
            origin["constrained"] = part.constrained
        decoder = TextDecoder(
            model.scheduler,
            loaded.tokenizer,
            loaded.trainable,
            loaded.frozen,
            config.batch.over_length,
            progress=f"{part.name}, {part.split}",
            # Prompts with examples are another kind than those that were trained.
            trained=None if part.examples else prompt_room(config.batch.sequence_length),
        )
        for task in tasks:
            if closed is None or task.name in closed:
                decoder.encode(task, [record.diagnosis for record in records])
        found.append(Prepared(part, records, tasks, decoder, closed, origin))

    def attempt() -> None:
        try:
            read()
        except FileNotFoundError as error:
            raise ValueError(str(error)) from None
        except ValueError as error:
            if not part.examples:
                raise
            raise ValueError(f"{error}. With examples: fewer of them (--examples)") from None

    try:
        parallel.on_all(attempt)
    except ValueError as error:
        raise Unasked(str(error)) from None
    return found[0]


def answer(asked: Prepared, config: settings.Settings, output: Path | None) -> None:
    """Decodes, scores and prints one part; writes too where `output` names a folder."""
    part, decoder, records, tasks = asked.part, asked.decoder, asked.records, asked.tasks
    result = answer_split(
        decoder,
        records,
        tasks,
        split=part.split,
        model=part.name,
        output=output,
        config=config,
        origin=asked.origin,
        constrained=asked.constrained,
    )
    rates = {}
    if part.robustness:
        # Only the main one has written them, and on its own disk perhaps.
        given = parallel.on_main(
            lambda: evaluation.read_predictions(output / evaluation.PREDICTIONS)
        )
        source = answer_source(decoder, config, asked.origin)
        with contextlib.closing(Journal(output / ROBUSTNESS_JOURNAL, source)) as journal:
            rates = robustness.probe_tasks(
                replace(decoder, journal=journal, progress=f"{part.name}, changed texts"),
                records,
                tasks,
                given,
                output if parallel.is_main_process() else None,
                fits=decoder.reads_whole,
                seed=config.seed,
            )
            journal.drop_others()
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
