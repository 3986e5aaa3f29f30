"""Records to token batches: encoding, length policy, order, packing.

Everything here is a function of (examples, config, seed, step), so the position of a run is its
step number and nothing else has to be saved. Numpy only; the arrays are placed by the caller.
"""

import functools
import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

OVER_LENGTH = ("fail", "trim_diagnosis", "drop")
SHORTEST_ANSWER = 2  # tokens: one, and EOS
BALANCED_STEPS = 64  # steps between which examples change places, to make them equally long


@dataclass(frozen=True)
class BatchConfig:
    """How examples become batches.

    Attributes:
      examples: per optimiser step, whatever the packing, the microbatches or the devices.
      microbatches: parts in which a step's rows go through the device, to save memory.
      sequence_length: tokens of a row; the longest example must fit.
      packing: several examples a row, isolated from each other; else one.
      over_length: what to do with an example that does not fit: "fail" names the rows,
        "trim_diagnosis" cuts words off the end of the diagnosis, "drop" leaves the case out.
    """

    examples: int
    microbatches: int
    sequence_length: int
    packing: bool
    over_length: str

    def __post_init__(self):
        for name in ("examples", "microbatches", "sequence_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"batch.{name} must be at least 1, not {getattr(self, name)}")
        if self.over_length not in OVER_LENGTH:
            raise ValueError(
                f"batch.over_length must be one of {OVER_LENGTH}, not {self.over_length!r}"
            )


@dataclass(frozen=True)
class Example:
    """Token ids of one prompt (BOS first) and its answer (EOS last)."""

    case_id: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens that go through the model: the last answer token is only predicted."""
        return len(self.prompt) + len(self.answer) - 1


@dataclass(frozen=True)
class LengthReport:
    """What the length policy did; counts of examples, lengths in tokens."""

    kept: int
    too_long: int
    trimmed: int
    dropped: int
    percentiles: dict[str, int]

    def __str__(self) -> str:
        lengths = ", ".join(f"{name} {value}" for name, value in self.percentiles.items())
        return (
            f"{self.kept} examples kept, {self.too_long} too long "
            f"({self.trimmed} trimmed, {self.dropped} dropped); tokens: {lengths}"
        )


def prompt_room(sequence_length: int, answer: int = SHORTEST_ANSWER) -> int:
    """Tokens that a prompt may have in a row of training beside its answer.

    Args:
      sequence_length: of the row.
      answer: tokens of the answer, with EOS, of which the last is only predicted. Left out for the
        most that any prompt can have had in training: in decoding, where the answer is not known.
    """
    return sequence_length + 1 - answer


def encode_prompt(tokenizer, text: str) -> list[int]:
    """Prompt ids with exactly one BOS; training and decoding both use this."""
    return [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]


def encode_answer(tokenizer, text: str) -> list[int]:
    """Answer ids with exactly one EOS, encoded apart from the prompt, as decoding emits them."""
    return [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]


def task_examples(
    records, tasks, tokenizer, config: BatchConfig
) -> tuple[list[Example], LengthReport]:
    """One example per record and task, after the length policy.

    Raises:
      ValueError: a record's answer is empty, or an example is too long and the policy is "fail",
        or even an empty diagnosis does not fit; cases are named by id, never by text.
    """
    examples: list[Example] = []
    lengths: list[int] = []
    too_long: list[str] = []
    unfit: list[str] = []
    trimmed = dropped = 0
    limit = config.sequence_length
    for record in records:
        for task in tasks:
            text = task.answer(record)
            if not text.strip():
                raise ValueError(f"case {record.case_id} has no answer for the task {task.name}")
            answer = tuple(encode_answer(tokenizer, text))
            prompt = tuple(encode_prompt(tokenizer, task.prompt(record.diagnosis)))
            example = Example(f"{record.case_id}/{task.name}", prompt, answer)
            lengths.append(example.length)
            if example.length > limit:
                too_long.append(example.case_id)
                if config.over_length == "drop":
                    dropped += 1
                    continue
                if config.over_length == "trim_diagnosis":
                    room = prompt_room(limit, len(answer))
                    prompt = trim_prompt(tokenizer, task, record.diagnosis, room)
                    if prompt is None:
                        unfit.append(example.case_id)
                        continue
                    trimmed += 1
                    example = Example(example.case_id, tuple(prompt), answer)
            examples.append(example)
    if unfit:
        raise ValueError(
            f"{len(unfit)} examples do not fit into batch.sequence_length={limit} even without "
            f"their diagnosis ({_some(unfit)}): raise batch.sequence_length"
        )
    if too_long and config.over_length == "fail":
        raise ValueError(
            f"{len(too_long)} of {len(lengths)} examples are longer than "
            f"batch.sequence_length={limit} tokens (longest {max(lengths)}; {_some(too_long)}): "
            "raise it, or choose batch.over_length='trim_diagnosis' or 'drop'"
        )
    if not examples:
        raise ValueError("no example is left after the length policy")
    report = LengthReport(len(examples), len(too_long), trimmed, dropped, _percentiles(lengths))
    return examples, report


def text_examples(
    documents: Sequence[str], tokenizer, config: BatchConfig
) -> tuple[list[Example], LengthReport]:
    """Plain text for full-parameter training: BOS is the prompt, all of the text is trained."""
    examples = [
        Example(f"document {number}", (tokenizer.bos_token_id,), tuple(answer))
        for number, document in enumerate(documents)
        if (answer := encode_answer(tokenizer, document))
    ]
    lengths = [example.length for example in examples]
    too_long = [e.case_id for e in examples if e.length > config.sequence_length]
    if too_long and config.over_length != "drop":
        raise ValueError(
            f"{len(too_long)} documents are longer than batch.sequence_length="
            f"{config.sequence_length} tokens (longest {max(lengths)}; {_some(too_long)}): "
            "raise it, or choose batch.over_length='drop'"
        )
    kept = [e for e in examples if e.length <= config.sequence_length]
    report = LengthReport(len(kept), len(too_long), 0, len(too_long), _percentiles(lengths))
    return kept, report


def split_examples(
    records, split: str, tasks, tokenizer, config: BatchConfig
) -> tuple[list[Example], LengthReport]:
    """A split's examples, of its tasks or as plain text; errors as of these two."""
    if tasks[0].name != "text":
        return task_examples(records, tasks, tokenizer, config)
    documents = tasks[0].documents(records, table=split == "train")
    return text_examples(documents, tokenizer, config)


@dataclass(frozen=True)
class Preflight:
    """What a tokenizer and a length limit would mean for a cohort, before any training.

    Attributes:
      facts: `limit`, `over_length` and per task: `examples`; percentiles of `tokens` (of the whole
        example, as the model sees it), `prompt` and `answer`; `too_long`, in all and by split;
        `kept`, `trimmed`, `dropped` under the policy ("fail" keeps nothing if anything is too
        long); `unfit`, of which not even an empty diagnosis fits; `tokens_cut`, percentiles of
        what "trim_diagnosis" would take off the diagnoses of the others. The answer is never cut.
      too_long: case_id, split, task, tokens, tokens_cut (None where unfit) of each such example.
    """

    facts: dict
    too_long: list[tuple[str, str, str, int, int | None]]

    def __str__(self) -> str:
        lines = []
        for name, facts in self.facts["tasks"].items():
            tokens = ", ".join(f"{point} {value}" for point, value in facts["tokens"].items())
            line = f"{name}: {tokens} tokens; {facts['too_long']['all']} of {facts['examples']}"
            line += f" longer than {self.facts['limit']}"
            if cut := facts["tokens_cut"]:
                line += (
                    f" (trimming cuts {cut['median']} tokens at the median, {cut['max']} at most)"
                )
            if facts["unfit"]:
                line += f"; {facts['unfit']} do not fit even without a diagnosis"
            lines.append(line)
        return "\n".join(lines)


def preflight(records, tasks, tokenizer, limit: int, over_length: str) -> Preflight:
    """Token lengths of every example, and what the length policy would do; nothing is raised for
    an example that is too long.

    Args:
      records: name of a split -> its records.
      tasks: to be rendered, each for each record.
      tokenizer: of the model to be tuned.
      limit: `batch.sequence_length`.
      over_length: one of OVER_LENGTH.

    Raises:
      ValueError: the limit or the policy is none, as in BatchConfig.
    """
    BatchConfig(1, 1, limit, False, over_length)
    found, too_long = {}, []
    for task in tasks:
        prompts, answers, cuts = [], [], []
        by_split, unfit = dict.fromkeys(records, 0), 0
        for split, own in records.items():
            prompt = _token_counts(tokenizer, [task.prompt(record.diagnosis) for record in own])
            answer = _token_counts(tokenizer, [task.answer(record) for record in own])
            for record, n, m in zip(own, prompt, answer, strict=True):
                if n + m - 1 <= limit:
                    continue
                by_split[split] += 1
                shorter = trim_prompt(tokenizer, task, record.diagnosis, prompt_room(limit, m))
                cut = None if shorter is None else n - len(shorter)
                unfit += cut is None
                cuts += [] if cut is None else [cut]
                too_long.append((record.case_id, split, task.name, n + m - 1, cut))
            prompts += prompt
            answers += answer
        long = sum(by_split.values())
        kept = {
            "fail": 0 if long else len(prompts),
            "drop": len(prompts) - long,
            "trim_diagnosis": 0 if unfit else len(prompts),
        }[over_length]
        found[task.name] = {
            "examples": len(prompts),
            "tokens": _percentiles([n + m - 1 for n, m in zip(prompts, answers, strict=True)]),
            "prompt": _percentiles(prompts),
            "answer": _percentiles(answers),
            "too_long": {"all": long} | by_split,
            "kept": kept,
            "trimmed": len(cuts) if kept and over_length == "trim_diagnosis" else 0,
            "dropped": long if over_length == "drop" else 0,
            "unfit": unfit,
            "tokens_cut": _percentiles(cuts) if cuts else None,
        }
    return Preflight({"limit": limit, "over_length": over_length, "tasks": found}, too_long)


def _token_counts(tokenizer, texts: Sequence[str]) -> list[int]:
    """Tokens of each text and its BOS or EOS: len(encode_prompt(...)), many texts at a time."""
    counts = []
    for start in range(0, len(texts), 1000):
        batch = tokenizer(list(texts[start : start + 1000]), add_special_tokens=False)
        counts += [len(ids) + 1 for ids in batch["input_ids"]]
    return counts


def trim_prompt(tokenizer, task, diagnosis: str, room: int) -> list[int] | None:
    """The prompt with as many leading words of the diagnosis as fit into `room` tokens.

    The instruction is never cut. None when not even an empty diagnosis fits.
    """
    words = diagnosis.split()

    def encoded(count: int) -> list[int]:
        return encode_prompt(tokenizer, task.prompt(" ".join(words[:count])))

    if len(encoded(0)) > room:
        return None
    low, high = 0, len(words)  # encoded(low) fits; find the largest count that does
    while low < high:
        middle = (low + high + 1) // 2
        if len(encoded(middle)) <= room:
            low = middle
        else:
            high = middle - 1
    return encoded(low)


def _percentiles(lengths: Sequence[int]) -> dict[str, int]:
    points = {"min": 0, "median": 50, "p95": 95, "p99": 99, "max": 100}
    return {name: int(np.percentile(lengths, p)) for name, p in points.items()}


def _some(names: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def share(lengths: Sequence[int], parts: int, *, equal: bool = False) -> list[list[int]]:
    """Shares items out so that all parts are about equally long.

    The longest item first, each to the part that is shortest so far (Graham 1969, SIAM J. Appl.
    Math. 17:416); then items of the longest part change places with some of the shortest, or just
    move there, while that helps.

    Args:
      lengths: of the items.
      parts: how many.
      equal: parts of equally many items; `parts` must divide their number.

    Returns:
      The items of each part, in the order given.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    shared: list[list[int]] = [[] for _ in range(parts)]
    totals = [0] * parts
    heap = [(0, part) for part in range(parts)]
    for item in order:
        total, part = heapq.heappop(heap)
        shared[part].append(item)
        totals[part] = total + lengths[item]
        if not equal or len(shared[part]) < len(lengths) // parts:
            heapq.heappush(heap, (totals[part], part))
    while True:
        long, short = totals.index(max(totals)), totals.index(min(totals))
        gap = totals[long] - totals[short]
        # Moving d tokens leaves a gap of |gap - 2 d|. None is an item of no length.
        exchanges = (
            (abs(gap - 2 * (lengths[i] - (0 if j is None else lengths[j]))), i, j)
            for i in shared[long]
            for j in (shared[short] if equal else (None, *shared[short]))
        )
        left, i, j = min(exchanges, key=lambda exchange: exchange[0], default=(gap, None, None))
        if left >= gap:
            return [sorted(part) for part in shared]
        for item, source, target in ((i, long, short), (j, short, long)):
            if item is not None:
                shared[source].remove(item)
                shared[target].append(item)
                totals[source] -= lengths[item]
                totals[target] += lengths[item]


class Batches:
    """Batches of one split, addressed by step.

    Every epoch visits each example once, in an order drawn from the seed (or, without one, as
    given); within some dozens of steps, examples change places so that all steps are about
    equally long. The last batch of an epoch may be short. All batches have the same shapes:
    with packing, as many rows as cost least, each as long as the fullest.

    Args:
      examples: of the split.
      config: how to batch; what a step sees does not depend on `packing` and `microbatches`.
      epochs: how often the examples are visited.
      seed: of the order; None keeps the order of the examples.
      row_multiple: rows of one microbatch are a multiple of this (devices along the batch).
      granule: packed rows are a multiple of this long.
      attention_cost: what a token's attention to one more place of its row costs, as a share of
        what the token costs otherwise; long rows are avoided by it.

    Attributes:
      steps, steps_per_epoch: of the whole run, and of one epoch.
      rows, row_length: of every batch.
      answer_capacity: places for answer tokens in each row.
      segments: the most examples in a row; `longest`: tokens of the longest example.
      fill: share of the rows' tokens that are some example's, over the whole run.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        config: BatchConfig,
        *,
        epochs: int,
        seed: int | None,
        row_multiple: int,
        granule: int = 8,
        attention_cost: float = 0.0,
    ):
        import grain  # here, because it imports jax, which the rest of this module does without

        if not examples:
            raise ValueError("there are no examples to batch")
        self.examples, self.config = examples, config
        order = grain.MapDataset.range(len(examples))
        if seed is not None:
            order = order.seed(seed).shuffle()
        self._order = order.repeat(epochs)
        self.steps_per_epoch = -(-len(examples) // config.examples)
        self.steps = self.steps_per_epoch * epochs
        self.longest = max(example.length for example in examples)
        if self.longest > config.sequence_length:
            raise ValueError(
                f"an example of {self.longest} tokens exceeds rows of {config.sequence_length}"
            )
        multiple = row_multiple * config.microbatches
        if config.packing:
            self.rows = self._cheapest_rows(multiple, granule, attention_cost)
        else:
            fullest = min(config.examples, len(examples))
            self.rows = -(-fullest // multiple) * multiple
        rows = [row for step in range(self.steps) for row in self._rows(step)]
        fullest = max(sum(examples[i].length for i in row) for row in rows)
        granule = granule if config.packing else max(32, granule)
        self.row_length = min(config.sequence_length, -(-fullest // granule) * granule)
        answers = max(sum(len(examples[i].answer) for i in row) for row in rows)
        self.answer_capacity = -(-answers // 8) * 8
        self.segments = max(map(len, rows))
        tokens = sum(example.length for example in examples) * epochs
        self.fill = tokens / (self.steps * self.rows * self.row_length)

    def _cheapest_rows(self, multiple: int, granule: int, attention_cost: float) -> int:
        """The number of rows of a batch that costs least, by a sample of the steps.

        Raises:
          ValueError: no number of rows keeps them within `sequence_length`.
        """
        limit = self.config.sequence_length
        sample = range(0, self.steps, -(-self.steps // 256))
        lengths = [[self.examples[i].length for i in self._chosen(step)] for step in sample]
        fullest = max(map(sum, lengths))
        best = None
        rows = -(-fullest // (limit * multiple)) * multiple
        last = -(-max(map(len, lengths)) // multiple) * multiple  # an example a row
        while rows <= last:
            longest = max(
                sum(step[i] for i in row) for step in lengths for row in share(step, rows)
            )
            if longest <= limit:
                row_length = -(-longest // granule) * granule
                cost = rows * row_length * (1 + attention_cost * row_length)
                if best is None or cost < best[0]:
                    best = cost, rows
            rows += multiple
        # Steps outside the sample may be a little longer.
        rows = last if best is None else best[1]
        while rows < last and any(
            sum(self.examples[i].length for i in row) > limit
            for step in range(self.steps)
            for row in self._shared(step, rows)
        ):
            rows += multiple
        return rows

    @functools.lru_cache(maxsize=2)  # noqa: B019 - lives as long as the run
    def _epoch(self, epoch: int) -> list[list[int]]:
        """The examples of each step of an epoch."""
        count, size = len(self.examples), self.config.examples
        order = [int(self._order[epoch * count + i]) for i in range(count)]
        steps = []
        window = BALANCED_STEPS * size
        whole = count // size * size  # what is left is the short last batch
        for start in range(0, whole, window):
            chosen = order[start : min(start + window, whole)]
            lengths = [self.examples[i].length for i in chosen]
            for part in share(lengths, len(chosen) // size, equal=True):
                steps.append([chosen[i] for i in part])
        return steps + ([order[whole:]] if whole < count else [])

    def _chosen(self, step: int) -> list[int]:
        """The examples of a step."""
        epoch, number = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[number]

    def _shared(self, step: int, rows: int) -> list[list[int]]:
        chosen = self._chosen(step)
        shared = share([self.examples[i].length for i in chosen], rows)
        return [[chosen[i] for i in row] for row in shared]

    @functools.lru_cache(maxsize=4)  # noqa: B019 - lives as long as the run
    def _rows(self, step: int) -> list[list[int]]:
        if self.config.packing:
            return self._shared(step, self.rows)
        return [[i] for i in self._chosen(step)]

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        """The batch of a step.

        Returns:
          int32 arrays with a leading axis of microbatches A and R rows each:
            tokens, positions, segment_ids [A, R, T]: segments count from 1, 0 is padding;
            positions restart in each segment.
            answer_index [A, R, M]: where in the row an answer token is predicted.
            targets [A, R, M]: the token predicted there.
            weights [A, R, M] float32: 1 for answer tokens, 0 for padding.
        """
        plan = self._rows(step)
        shape = (self.rows, self.row_length)
        answers = (self.rows, self.answer_capacity)
        batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "positions", "segment_ids")}
        batch |= {name: np.zeros(answers, np.int32) for name in ("answer_index", "targets")}
        batch["weights"] = np.zeros(answers, np.float32)
        for r, row in enumerate(plan):
            start = answer_start = 0
            for segment, index in enumerate(row, start=1):
                example = self.examples[index]
                tokens = [*example.prompt, *example.answer]
                stop = start + example.length
                batch["tokens"][r, start:stop] = tokens[:-1]
                batch["positions"][r, start:stop] = np.arange(example.length)
                batch["segment_ids"][r, start:stop] = segment
                count = len(example.answer)
                here = slice(answer_start, answer_start + count)
                first = start + len(example.prompt) - 1
                batch["answer_index"][r, here] = np.arange(first, first + count)
                batch["targets"][r, here] = example.answer
                batch["weights"][r, here] = 1
                start, answer_start = stop, answer_start + count
        parts = self.config.microbatches
        return {name: array.reshape(parts, self.rows // parts, -1) for name, array in batch.items()}

    def case_ids(self, step: int) -> list[str]:
        return [self.examples[index].case_id for row in self._rows(step) for index in row]

    def useful_tokens(self, step: int) -> int:
        """Tokens of the step's examples, padding not counted."""
        return sum(self.examples[index].length for index in self._chosen(step))
