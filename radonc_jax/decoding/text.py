"""From a task and diagnoses to answers in text: prompts, length policy, constraints, journal."""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
from tqdm import tqdm

from radonc_jax.data.batches import encode_answer, encode_prompt, trim_prompt
from radonc_jax.decoding.constrain import Trie, build_trie
from radonc_jax.decoding.greedy import Generation
from radonc_jax.decoding.journal import Journal
from radonc_jax.decoding.scheduler import Answer, Scheduler, progress_bar
from radonc_jax.tasks import Task

# Diagnoses that begin in every way one may: what their prompts have in common, all have.
PROBES = ("A", "a", "1", "(", "-", '"', "É", "left breast", "C50.911", "T1 N0", ".", "#", "")


def generation(tokenizer, answer: Answer) -> Generation:
    """An answer with its text."""
    text = tokenizer.decode(answer.tokens, skip_special_tokens=True).strip()
    return Generation(text, *answer)


def shared_prefix(tokenizer, task: Task) -> tuple[int, ...]:
    """Token ids with which prompts of a task begin: its instruction.

    Tokenised together with what follows, for there a tokenizer may join characters. A function of
    the task alone; a prompt that does not begin like that, if there is one, is run whole.
    """
    prompts = [encode_prompt(tokenizer, task.prompt(probe)) for probe in PROBES]
    columns = zip(*prompts, strict=False)
    shared = []
    for column in columns:
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return tuple(shared)


@dataclass(frozen=True)
class Constraint:
    """The only answers that a task may get.

    Attributes:
      name: what is constrained and how, for files.
      labels: answers to be scored one by one, with `label_ids`; else empty.
      label_ids: token ids of each, with the stop token.
      trie: of the answers' token ids; None where labels are scored.
      digest: hash of the answers.
    """

    name: str
    labels: tuple[str, ...]
    label_ids: tuple[tuple[int, ...], ...]
    trie: Trie | None
    digest: str

    def check(self, max_new_tokens: int) -> None:
        """ValueError if an answer would be cut off."""
        longest = self.trie.depth if self.trie else max(map(len, self.label_ids))
        if longest > max_new_tokens:
            raise ValueError(
                f"the longest answer that is allowed has {longest} tokens: raise max_new_tokens "
                f"({max_new_tokens})"
            )


def constrain_task(tokenizer, task: Task, codes: Sequence[str]) -> Constraint | None:
    """Modality by scoring its labels, ICD-10-CM by a trie of codes; None for free text.

    Args:
      tokenizer: answers are encoded as for training.
      task: of the answers.
      codes: ICD-10-CM codes that may be answered.

    Raises:
      ValueError: there are no codes.
    """
    if task.labels:
        answers = tuple(task.labels)
    elif task.name == "icd":
        answers = tuple(sorted(set(codes)))
        if not answers:
            raise ValueError("there is no ICD-10-CM code that could be answered")
    else:
        return None
    ids = tuple(tuple(encode_answer(tokenizer, answer)) for answer in answers)
    digest = hashlib.sha256(repr((answers, ids)).encode()).hexdigest()
    if task.labels:
        return Constraint("labels", answers, ids, None, digest)
    return Constraint("codes", (), (), build_trie(ids), digest)


class Prompt(NamedTuple):
    """A prompt as the model gets it.

    Attributes:
      tokens: its ids.
      trimmed: the diagnosis was cut.
      fits: there is room for it and an answer in the context.
      beyond: it is longer than any prompt in training can have been.
    """

    tokens: list[int]
    trimmed: bool
    fits: bool
    beyond: bool


@dataclass(frozen=True)
class TextDecoder:
    """One model as a function: a task and diagnoses in, answers out, in order.

    Attributes:
      scheduler, tokenizer: of the model.
      trainable, frozen: its arrays.
      over_length: "trim_diagnosis" cuts words off the end of the diagnosis, as in training, where
        the prompt is longer than any in training or does not fit the context beside its answer,
        and flags the answer. Under another policy the former is told (`Prompt.beyond`), the latter
        an error, because cases that are compared must not drop out.
      progress: name of a progress bar, or a bar; None for none.
      journal: where answers are kept, and looked up before anything is run.
      constraints: by task name; tasks without one are answered freely.
      trained: tokens of the longest prompt that training can have had (`batches.prompt_room`);
        None where nothing is known of it.
    """

    scheduler: Scheduler
    tokenizer: object
    trainable: object
    frozen: object
    over_length: str = "fail"
    progress: str | tqdm | None = None
    journal: Journal | None = None
    constraints: dict[str, Constraint] = field(default_factory=dict)
    trained: int | None = None

    @functools.cached_property
    def _prefixes(self) -> dict[str, tuple[int, ...]]:
        return {}

    def source(self) -> dict:
        """What answers depend on besides weights, precision, prompt and constraint, as JSON."""
        mesh, written = self.scheduler.mesh, self.tokenizer.backend_tokenizer.to_str()
        return {
            "max_new_tokens": self.scheduler.max_new_tokens,
            "batch": self.scheduler.batch,
            "mesh": dict(mesh.shape),
            "device": mesh.devices.flat[0].device_kind,
            "stops": list(self.scheduler.stops),
            "trained_prompt": self.trained,
            "tokenizer": hashlib.sha256(written.encode()).hexdigest(),
            "jax": jax.__version__,
        }

    def encode(self, task: Task, diagnoses: Sequence[str]) -> list[Prompt]:
        """The prompt of each.

        Raises:
          ValueError: a prompt is too long and may not be cut, or not even its instruction fits.
        """
        prompts = [self.prompt(task, diagnosis) for diagnosis in diagnoses]
        self.scheduler.check([prompt.tokens for prompt in prompts])
        return prompts

    def reads_whole(self, task: Task, diagnosis: str) -> bool:
        """Whether a diagnosis can be answered without being cut."""
        prompt = self.prompt(task, diagnosis)
        return prompt.fits and not prompt.trimmed

    def prompt(self, task: Task, diagnosis: str) -> Prompt:
        """The prompt of a diagnosis, cut where the policy is to cut; it may still not fit."""
        context = self.scheduler.room
        rooms = [context] if self.trained is None else [min(self.trained, context), context]
        tokens = encode_prompt(self.tokenizer, task.prompt(diagnosis))
        trimmed = False
        if self.over_length == "trim_diagnosis":
            # An instruction that was not trained may be longer than all that training saw.
            for room in rooms:
                if len(tokens) <= room:
                    break
                cut = trim_prompt(self.tokenizer, task, diagnosis, room)
                if cut is not None:
                    tokens, trimmed = cut, True
                    break
        beyond = self.trained is not None and len(tokens) > self.trained
        return Prompt(tokens, trimmed, len(tokens) <= context, beyond)

    def __call__(self, task: Task, diagnoses: Sequence[str]) -> list[Generation]:
        """Answers a task for each diagnosis; errors as `encode`."""
        return self.answer(task, self.encode(task, diagnoses))

    def answer(self, task: Task, prompts: Sequence[Prompt]) -> list[Generation]:
        """Answers prompts of a task, in order; ValueError if one does not fit."""
        constraint = self.constraints.get(task.name)
        found: dict[tuple, dict] = {}
        keys = {}
        for prompt in (tuple(prompt.tokens) for prompt in prompts):
            if prompt in keys:
                continue
            keys[prompt] = ""
            if self.journal is not None:
                name = "" if constraint is None else f"{constraint.name} {constraint.digest}"
                keys[prompt] = self.journal.key(prompt, name)
                entry = self.journal.get(keys[prompt])
                if entry is not None:
                    found[prompt] = entry
        # Equal prompts have equal answers: each is run once.
        left = [prompt for prompt in keys if prompt not in found]
        with progress_bar(self.progress, len(prompts)) as bar:
            bar.update(len(prompts) - len(left))
            for number, entry in self._run(task, constraint, left):
                found[left[number]] = entry
                if self.journal is not None:
                    self.journal.add(keys[left[number]], entry)
                bar.update()
        return [
            self._generation(found[tuple(prompt.tokens)], constraint, prompt.trimmed)
            for prompt in prompts
        ]

    def _run(self, task: Task, constraint: Constraint | None, prompts):
        """(number, what the journal keeps of the answer) of each prompt, as they finish."""
        if task.name not in self._prefixes:
            self._prefixes[task.name] = shared_prefix(self.tokenizer, task)
        options = {"prefix": self._prefixes[task.name]}
        arrays = (self.trainable, self.frozen, prompts)
        if constraint is not None and constraint.labels:
            scored = self.scheduler.score(*arrays, constraint.label_ids, **options)
            for number, values in scored:
                yield number, {"label_logprobs": values}
            return
        trie = None if constraint is None else constraint.trie
        for number, answer in self.scheduler.stream(*arrays, trie=trie, **options):
            yield number, answer._asdict()

    def _generation(self, entry: dict, constraint: Constraint | None, trimmed: bool) -> Generation:
        scores = entry.get("label_logprobs")
        if scores is None:
            answer = generation(self.tokenizer, Answer(**entry))
            text, tokens, logprob = answer.text, answer.tokens, answer.logprob
            return Generation(text, tokens, logprob, answer.finished, answer.gap, trimmed)
        best = max(range(len(scores)), key=scores.__getitem__)
        second = max(score for number, score in enumerate(scores) if number != best)
        return Generation(
            text=constraint.labels[best],
            tokens=list(constraint.label_ids[best][:-1]),
            logprob=scores[best],
            finished=True,
            gap=scores[best] - second,
            trimmed=trimmed,
            label_logprobs=dict(zip(constraint.labels, scores, strict=True)),
        )
