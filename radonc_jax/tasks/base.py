"""What a task is: one cohort row in, a prompt and an answer out, and back from output to answer.

A task knows nothing of tokens, models or scores. Training and decoding render prompts here and
nowhere else, so the two cannot drift apart.
"""

import random
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

# Short, because every case pays for it in training and in decoding.
PROMPT = "{instruction}\n\n### Diagnosis:\n{diagnosis}\n\n### Answer:\n"

_BEFORE_DIAGNOSIS, _AFTER_DIAGNOSIS = PROMPT.split("{diagnosis}")


@dataclass(frozen=True)
class Record:
    """One row of a cohort parquet; the fields are its columns of the same names."""

    case_id: str
    patient_id: str
    diagnosis: str
    regimen: str
    modality: str
    icd10: str


def tidy_diagnosis(diagnosis: str) -> str:
    """One space between words, no blank lines, no white space at either end."""
    lines = (" ".join(line.split()) for line in diagnosis.splitlines())
    return "\n".join(line for line in lines if line)


def answer_section(output: str) -> str:
    """The part of a raw output that answers the prompt.

    A model that was never taught where to stop goes on to invent the next record under a new
    "###" heading. What it says there answers another question and is not read.
    """
    return re.split(r"^\s*###", output, maxsplit=1, flags=re.MULTILINE)[0].strip()


class Task(ABC):
    """Base of the three question-and-answer tasks.

    Subclasses set `name` (as in configs and files), `instruction` (one short sentence: it costs
    tokens in every prompt), `labels` (the closed set of answers, or None) and `has_classes`
    (False for free text, where precision and recall have no meaning).
    """

    name: str
    instruction: str
    labels: tuple[str, ...] | None = None
    has_classes: bool = True

    def prompt_parts(self, diagnosis: str) -> tuple[str, str, str]:
        """(prefix, diagnosis, suffix); their concatenation is `prompt(diagnosis)`.

        The prefix is the same for every case of a task, so a decoder may share it, and a prompt
        that is too long can be cut in its middle part only.
        """
        prefix = _BEFORE_DIAGNOSIS.format(instruction=self.instruction)
        return prefix, tidy_diagnosis(diagnosis), _AFTER_DIAGNOSIS

    def prompt(self, diagnosis: str) -> str:
        """The text a model reads before it answers, in training and in decoding alike."""
        return "".join(self.prompt_parts(diagnosis))

    def answer(self, record: Record) -> str:
        """The text that training teaches: the reference itself unless a task says otherwise."""
        return self.reference(record)

    @abstractmethod
    def reference(self, record: Record) -> str:
        """The canonical right answer.

        Raises:
          ValueError: the record's field cannot be read; the message names the case id alone.
        """

    @abstractmethod
    def parse(self, output: str) -> str | None:
        """The canonical answer in a model's raw output, or None if it holds none."""

    def correct(self, answer: str | None, reference: str) -> bool:
        """Whether a parsed answer counts as right. An unparseable one (None) never does."""
        return answer is not None and answer == reference


class WithExamples(Task):
    """A task whose prompt shows cases with their answers before it asks: few-shot prompting, for a
    model that was not tuned. Everything but the prompt is the task's own.

    Args:
      task: what is asked.
      examples: records of the training split, shown in this order.
    """

    def __init__(self, task: Task, examples: Sequence[Record]):
        self.task = task
        self.name, self.labels, self.has_classes = task.name, task.labels, task.has_classes
        self.instruction = task.instruction
        self.shown = "".join(
            f"{task.prompt(example.diagnosis)}{task.answer(example)}\n\n" for example in examples
        )

    def prompt_parts(self, diagnosis: str) -> tuple[str, str, str]:
        prefix, middle, suffix = self.task.prompt_parts(diagnosis)
        return self.shown + prefix, middle, suffix

    def reference(self, record: Record) -> str:
        return self.task.reference(record)

    def parse(self, output: str) -> str | None:
        return self.task.parse(output)

    def correct(self, answer: str | None, reference: str) -> bool:
        return self.task.correct(answer, reference)


def choose_examples(
    task: Task, training: Sequence[Record], number: int, seed: int = 0
) -> list[Record]:
    """`number` training records of as many different answers as there are, drawn with the seed.

    Different answers first: examples that all say the same would teach the majority class. The
    order of `training` does not matter.

    Raises:
      ValueError: `number` is below 1 or the split has fewer records.
    """
    if not 1 <= number <= len(training):
        raise ValueError(
            f"{number} examples cannot be drawn from {len(training)} training cases; choose "
            f"--examples between 1 and {len(training)}"
        )
    mixed = sorted(training, key=lambda record: record.case_id)
    random.Random(seed).shuffle(mixed)
    seen: Counter = Counter()
    rounds = []
    for record in mixed:
        answer = task.reference(record)
        rounds.append((seen[answer], len(rounds), record))
        seen[answer] += 1
    return [record for _, _, record in sorted(rounds, key=lambda entry: entry[:2])[:number]]
