"""From prompts of any number and length to full slots of few shapes, and back.

The host's half of decoding. A cache of fixed slots lives on the devices. Prompts of like length are
run together into free slots, then all slots go on token by token until enough of them are free
again: a row that ends early makes room for the next prompt at once. Prefills have a few shapes
(`prefills`), each of which is compiled once.
"""

import contextlib
import functools
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from radonc_jax import compiler, parallel
from radonc_jax.decoding import constrain, greedy
from radonc_jax.decoding.prefills import padded_length, plan
from radonc_jax.models.decoder import Cache
from radonc_jax.models.lora import Partition

# A cache is made shorter to so much of its length at most, and with so many batches to come at
# least: each length is compiled for, and while it is cut a part of it is held twice.
MOST_KEPT = {"cpu": 0.75, "gpu": 0.5, "tpu": 0.5}
FEWEST_BATCHES = {"cpu": 1, "gpu": 4, "tpu": 4}
# Tokens of a prefill. Enough to keep the products large, and few enough that rows which no prompt
# is left for cost little.
PREFILL_TOKENS = {"cpu": 1024, "gpu": 8192, "tpu": 8192}
# What a prefill of fewer tokens loses, as a share of those: reading the weights once more.
PREFILL_OVERHEAD = 1 / 32
SHAPES_AHEAD = 8  # are compiled while others run, where cores are free for it
# A row's float32 numbers are the same to the last bit, whatever rows are beside it and however
# many, where XLA adds them up in the same order. On a CPU (jaxlib 0.10.2, by experiment, which the
# tests repeat) that is so with at least two rows, of at least 4096 numbers together wherever a
# row's own are reduced, with keys in multiples of 64, and with heads of `products.COLUMNS`.
FEWEST_ROWS, FEWEST_NUMBERS = 2, 4096


class Answer(NamedTuple):
    """What `greedy.Generation` has of one prompt, without the text."""

    tokens: list[int]
    logprob: float
    finished: bool
    gap: float | None


class Scheduler:
    """Decodes lists of prompts with one model on one mesh.

    Keep one and call it again: each shape is compiled once, on GPUs while others run.

    Args:
      partition: the model without its arrays.
      mesh: the arrays' mesh; the slots are spread over its data and fsdp axes.
      batch: slots, so rows decoded together; rounded up to what the mesh divides, and to the few
        rows with which a row's numbers depend on no other.
      max_new_tokens: longest answer, the stop token included.
      stops: token ids that end an answer.
      context: positions that the model has (`max_position_embeddings`).

    Attributes:
      mesh, max_new_tokens, stops, context: as given.
      batch: slots there are.
      steps: decode steps that `stream` has run so far, each of which reads all weights once; the
        device counts them, and the count comes with the rows that are read anyway.

    Raises:
      ValueError: `batch` or `max_new_tokens` is below 1, or no prompt would fit the context.
    """

    def __init__(
        self,
        partition: Partition,
        mesh: Mesh,
        *,
        batch: int,
        max_new_tokens: int,
        stops: Sequence[int],
        context: int,
    ):
        if batch < 1 or max_new_tokens < 1:
            raise ValueError(
                f"decode.batch ({batch}) and decode.max_new_tokens ({max_new_tokens}) "
                "must be at least 1"
            )
        if max_new_tokens >= context:
            raise ValueError(
                f"decode.max_new_tokens ({max_new_tokens}) leaves no room for a prompt in the "
                f"model's context of {context}: choose a smaller one"
            )
        self.mesh = mesh
        self._shards = int(np.prod([mesh.shape[axis] for axis in parallel.BATCH_AXES]))
        shapes = partition.merge(partition.trainable, partition.frozen)
        self._architecture = (shapes.config, shapes.dtype)
        device = mesh.devices.flat[0]
        # On the host itself a layer's weights can be read where they lie in the stack; elsewhere
        # the scan picks them by index.
        self._by_layer = mesh.size == 1 and device.platform == "cpu"
        self._fewest = FEWEST_ROWS
        if self._by_layer:
            sizes = (shapes.config.hidden_size, shapes.config.num_heads * greedy.CACHE_STEP)
            self._fewest = max(FEWEST_ROWS, -(-FEWEST_NUMBERS // min(sizes)))
        self.batch = self._spread(batch)
        self.max_new_tokens = max_new_tokens
        self.context = context
        self.stops = tuple(int(stop) for stop in stops)
        self.steps = 0
        self._partition = partition
        # Shapes that prefills have had: (begins with the prefix, rows, width). They are compiled,
        # for caches of the same length at least.
        self._streamed: set[tuple[bool, int, int]] = set()
        self._scored: set[tuple[bool, int, int]] = set()
        platform = device.platform if device.platform in PREFILL_TOKENS else "gpu"
        self._prefill_tokens = PREFILL_TOKENS[platform]
        self._most_kept, self._fewest_batches = MOST_KEPT[platform], FEWEST_BATCHES[platform]
        self._compile()

    def _spread(self, rows: int) -> int:
        return max(-(-rows // self._shards), self._fewest) * self._shards

    def _compile(self) -> None:
        partition, stops, by_layer = self._partition, self.stops, self._by_layer
        parts = self._shards
        whole = parallel.replicated(self.mesh)

        def sharded(axes):
            return NamedSharding(self.mesh, PartitionSpec(*axes))

        cache = sharded(greedy.CACHE_AXES[by_layer:])
        placed = greedy.State(Cache(cache, cache), sharded((parallel.BATCH_AXES,)))
        shared_axes = sharded(greedy.SHARED_AXES)

        def empty(model_config, dtype, length):
            return greedy.empty(
                model_config, dtype, self.batch, length, self.max_new_tokens, by_layer
            )

        def begin(trainable, frozen, tokens, length):
            return greedy.begin(partition.merge(trainable, frozen), tokens, length)

        def admit(trainable, frozen, state, shared, begun, tokens, lengths, slots, trie):
            model = partition.merge(trainable, frozen)
            return greedy.admit(model, state, shared, begun, tokens, lengths, slots, stops, trie)

        def decode(weights, state, shared, wanted, each, trie):
            # Each layer's weights make a model of that one layer; what is no layer they share.
            models = [partition.merge(*pair) for pair in weights]
            blocks = [model.layers for model in models] if by_layer else None

            def step(state):
                return greedy.advance(models[0], blocks, state, shared, stops, trie)

            state, steps = greedy.decode(step, state, parts, wanted, each)
            return state, (state.rows, steps)

        def score(trainable, frozen, shared, begun, tokens, lengths, labels, label_lengths):
            model = partition.merge(trainable, frozen)
            beginning = greedy.beginning_of(shared, jnp.full_like(lengths, begun))
            logits, cache = greedy.run_prompts(
                model, beginning, tokens, lengths, spare=labels.shape[1]
            )
            return constrain.score_labels(
                model, logits, cache, beginning, begun + lengths, labels, label_lengths
            )

        device = self.mesh.devices.flat[0]
        jit = functools.partial(jax.jit, compiler_options=compiler.options(device, "decoding"))
        self._workers = compiler.workers(device)
        ahead = functools.partial(compiler.Ahead, workers=self._workers)

        def cut(side, length):
            return jax.tree.map(lambda array: array[..., :length, :], side)

        # Weights are arguments: as constants they would be copied into every compiled shape. The
        # slots are donated, so that the cache stays where it is. What the host reads comes whole to
        # every process, which then all know the same.
        self._empty = jit(empty, static_argnums=(0, 1, 2), out_shardings=placed)
        self._begin = jit(begin, out_shardings=shared_axes)
        self._cut = jit(cut, static_argnums=1, out_shardings=cache)
        self._admit = ahead(jit(admit, donate_argnums=2, out_shardings=placed))
        self._decode = ahead(jit(decode, donate_argnums=1, out_shardings=(placed, whole)))
        self._score = ahead(jit(score, out_shardings=whole))
        self._ahead = (self._admit, self._decode, self._score)

    @property
    def room(self) -> int:
        """Tokens of the longest prompt that fits the context together with its answer."""
        return self.context - self.max_new_tokens

    def check(self, prompts: Sequence[Sequence[int]]) -> None:
        """Raises what a call would raise for these prompts, before anything is run.

        Raises:
          ValueError: a prompt is empty, or too long for the context together with its answer.
        """
        empty = sum(len(prompt) == 0 for prompt in prompts)
        if empty:
            raise ValueError(f"{empty} of {len(prompts)} prompts are empty")
        long = [len(prompt) for prompt in prompts if len(prompt) > self.room]
        if long:
            raise ValueError(
                f"{len(long)} of {len(prompts)} prompts are too long: the longest has {max(long)} "
                f"tokens, but the context of {self.context} leaves {self.room} beside "
                f"{self.max_new_tokens} new tokens. Shorten these prompts, or choose a smaller "
                "decode.max_new_tokens"
            )

    def __call__(
        self,
        trainable,
        frozen,
        prompts: Sequence[Sequence[int]],
        *,
        prefix: Sequence[int] = (),
        trie: constrain.Trie | None = None,
        progress: str | tqdm | None = None,
    ) -> list[Answer]:
        """Decodes every prompt; as `stream`, in the order of the prompts.

        Args:
          progress: name of a progress bar, or the caller's own, which is moved on by each
            answer; None for no bar.
        """
        results: list = [None] * len(prompts)
        with progress_bar(progress, len(prompts)) as bar:
            for number, answer in self.stream(trainable, frozen, prompts, prefix=prefix, trie=trie):
                results[number] = answer
                bar.update()
        return results

    def stream(
        self,
        trainable,
        frozen,
        prompts: Sequence[Sequence[int]],
        *,
        prefix: Sequence[int] = (),
        trie: constrain.Trie | None = None,
    ) -> Iterator[tuple[int, Answer]]:
        """Decodes every prompt; in a run of several processes all of them call it alike.

        Args:
          trainable, frozen: the arrays of `partition`, placed on the mesh.
          prompts: token ids, each beginning with BOS where the model wants one.
          prefix: token ids with which many prompts begin: they are run once, and what they leave
            is held once. It is given and not found out, so that a prompt's numbers do not depend
            on which others are there; with and without it their last bits differ.
          trie: the only answers that may be given, each ending in a stop token; None for any.

        Yields:
          (number of the prompt, its answer), as the answers finish.

        Raises:
          ValueError: as `check`.
        """
        self.check(prompts)
        try:
            yield from self._stream(trainable, frozen, prompts, prefix, trie)
        finally:
            self._cancel()

    def _stream(self, trainable, frozen, prompts, prefix, trie) -> Iterator[tuple[int, Answer]]:
        if not prompts:
            return
        groups = self._groups(prompts, prefix, self._streamed)
        self._streamed.update(group[1:] for group in groups)

        def places(number, shared):  # of a cache, for a prompt and its answer
            return len(prompts[number]) - len(prefix) * shared + self.max_new_tokens

        needed = deque(
            max(width, *(places(i, shared) for i in group)) for group, shared, _, width in groups
        )
        with jax.set_mesh(self.mesh):
            started = self._prefix(trainable, frozen, prefix)
            everywhere = self._layers(started[0])
            weights = self._weights(trainable, frozen)
            state = self._empty(*self._architecture, padded_length(max(needed)))
        size = self.batch // self._shards

        expected = set()

        def expect(state):
            """Has the next few shapes compiled while others run."""
            for shape in list(dict.fromkeys(group[1:] for group in groups))[:SHAPES_AHEAD]:
                if (*shape, state.cache.length) in expected:
                    continue
                expected.add((*shape, state.cache.length))
                shared, rows, width = shape
                self._admit.expect(
                    trainable,
                    frozen,
                    state,
                    *(started if shared else (None, np.int32(0))),
                    *self._rows(prompts, [None] * rows, 0, width),
                    self._slots(np.zeros(rows, np.int32)),
                    trie,
                )
                self._decode.expect(weights, state, everywhere, np.int32(0), np.int32(0), trie)

        free, held, ends = [list(range(size)) for _ in range(self._shards)], {}, {}
        while groups or held:
            with jax.set_mesh(self.mesh):
                if sum(len(group) for group, *_ in groups) >= self._fewest_batches * self.batch:
                    longer = state.cache.length
                    state = self._shorten(state, max([*needed, *ends.values()]))
                    if state.cache.length < longer:
                        self._cancel()
                if self._workers is not None:
                    expect(state)
                while groups and (seats := self._seats(free, groups[0])):
                    needed.popleft()
                    group, shared, rows, width = groups.popleft()
                    seated, slots = [None] * rows, np.full(rows, size, np.int32)
                    for number, (row, part, slot) in zip(group, seats, strict=True):
                        seated[row], slots[row] = number, slot
                        held[part * size + slot] = number
                        ends[number] = places(number, shared)
                    state = self._admit(
                        trainable,
                        frozen,
                        state,
                        *(started if shared else (None, np.int32(0))),
                        *self._rows(prompts, seated, len(prefix) * shared, width),
                        self._slots(slots),
                        trie,
                    )
                # Until the next group fits; at the end a few at a time, so that little is lost
                # where the process is.
                wanted, rows = self.batch - len(held) + max(1, len(held) // 4), self.batch
                if groups:
                    wanted, rows = len(groups[0][0]), groups[0][2]
                limits = np.int32(wanted), np.int32(rows // self._shards)
                state, told = self._decode(weights, state, everywhere, *limits, trie)
                rows, steps = jax.device_get(told)
            self.steps += int(steps)
            for slot in [slot for slot in held if rows.done[slot]]:
                free[slot // size].append(slot % size)
                gap, number = float(rows.gap[slot]), held.pop(slot)
                del ends[number]
                yield (
                    number,
                    Answer(
                        rows.tokens[slot, : rows.counts[slot]].tolist(),
                        float(rows.logprob[slot]),
                        bool(rows.finished[slot]),
                        gap if np.isfinite(gap) else None,
                    ),
                )

    def score(
        self,
        trainable,
        frozen,
        prompts: Sequence[Sequence[int]],
        labels: Sequence[Sequence[int]],
        *,
        prefix: Sequence[int] = (),
    ) -> Iterator[tuple[int, list[float]]]:
        """Log-probability of each label after each prompt, without any decoding.

        Args:
          trainable, frozen, prompts, prefix: as those of `stream`.
          labels: token ids, each with its stop token.

        Yields:
          (number of the prompt, a value a label).

        Raises:
          ValueError: as `check`, or a label is longer than `max_new_tokens`.
        """
        self.check(prompts)
        if max(len(label) for label in labels) > self.max_new_tokens:
            raise ValueError(
                f"the longest label has {max(len(label) for label in labels)} tokens: raise "
                f"decode.max_new_tokens ({self.max_new_tokens})"
            )
        if not prompts:
            return
        lengths = np.asarray([len(label) for label in labels], np.int32)
        padded = np.zeros((len(labels), lengths.max()), np.int32)
        for row, label in enumerate(labels):
            padded[row, : len(label)] = label
        groups = self._groups(prompts, prefix, self._scored)
        self._scored.update(group[1:] for group in groups)
        with jax.set_mesh(self.mesh):
            started = self._prefix(trainable, frozen, prefix)

        def arguments(group, shared, rows, width):
            return (
                trainable,
                frozen,
                *(started if shared else (None, np.int32(0))),
                *self._rows(
                    prompts, group + [None] * (rows - len(group)), len(prefix) * shared, width
                ),
                padded,
                lengths,
            )

        if self._workers is not None:
            with jax.set_mesh(self.mesh):
                for _, *shape in groups:
                    self._score.expect(*arguments([], *shape))
        try:
            for group, *shape in groups:
                with jax.set_mesh(self.mesh):
                    values = jax.device_get(self._score(*arguments(group, *shape)))
                for number, row in zip(group, values, strict=False):  # filler rows are the last
                    yield number, [float(value) for value in row]
        finally:
            self._cancel()

    def _cancel(self) -> None:
        """Programs that were expected and have not been begun are not compiled any more."""
        for ahead in self._ahead:
            ahead.cancel()

    def _groups(self, prompts, prefix, used: Collection[tuple] = ()) -> deque:
        """What is run together: (prompt numbers, begins with the prefix, rows, width), longest
        prompts first, whose slots are the longest too. `used`: shapes that there were before."""
        prefix = list(prefix)
        groups = deque()
        begins = [
            bool(prefix) and len(p) > len(prefix) and list(p[: len(prefix)]) == prefix
            for p in prompts
        ]
        for shared in (True, False):
            left = {
                number: len(prompt) - len(prefix) * shared
                for number, prompt in enumerate(prompts)
                if begins[number] == shared
            }
            order = sorted(left, key=lambda number: -left[number])
            lengths = [left[number] for number in order]
            # A wider one would make the slots longer.
            widest = padded_length(max(lengths, default=0) + self.max_new_tokens)
            shapes = plan(
                lengths,
                self._rows_of,
                {(rows, width) for kind, rows, width in used if kind == shared and width <= widest},
                overhead=int(self._prefill_tokens * PREFILL_OVERHEAD),
            )
            start = 0
            for rows, width in shapes:
                groups.append((order[start : start + rows], shared, rows, width))
                start += rows
        return groups

    def _rows_of(self, width: int) -> list[int]:
        """How many rows a prefill may have: the most, half of them, a quarter and so on."""
        rows = [min(self._spread(self._prefill_tokens // width), self.batch)]
        while (half := self._spread(rows[-1] // 2)) < rows[-1]:
            rows.append(half)
        return rows

    def _seats(self, free: list[list[int]], group) -> list[tuple[int, int, int]] | None:
        """(row of the prefill, part, slot within the part) of each prompt of a group, in the part
        of the batch that one device has: the row and the slot lie on the same one.

        Taken from `free`, slots by part, evenly; None, and nothing is taken, when too few are.
        """
        each = group[2] // self._shards
        if sum(min(len(slots), each) for slots in free) < len(group[0]):
            return None
        seats, taken = [], [0] * self._shards
        for _ in group[0]:
            open_parts = (part for part, count in enumerate(taken) if count < each)
            part = max(open_parts, key=lambda part: len(free[part]))
            seats.append((part * each + taken[part], part, free[part].pop()))
            taken[part] += 1
        return seats

    def _shorten(self, state: greedy.State, needed: int) -> greedy.State:
        """The slots with places for `needed` tokens, where that is much less than they have.

        The longest prompts come first. Once they are done, each step would go on reading places
        that nobody fills.
        """
        length = greedy.cache_length(padded_length(needed))
        if length > self._most_kept * state.cache.length:
            return state
        cut = []
        for side in (state.cache.key, state.cache.value):
            cut.append(self._cut(side, length))
            jax.tree.map(lambda array: array.delete(), side)  # one side at a time is held twice
        return greedy.State(Cache(*cut), state.rows)

    def _rows(self, prompts, seated, begun: int, width: int):
        """Tokens [rows, width] and lengths [rows] on the mesh; `seated` has each row's prompt, None
        for a filler row."""
        rows = len(seated)
        tokens, lengths = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
        for row, number in enumerate(seated):
            if number is None:
                continue
            rest = prompts[number][begun:]
            tokens[row, : len(rest)] = rest
            lengths[row] = len(rest)
        return parallel.put((tokens, lengths), self.mesh, parallel.BATCH_AXES)

    def _slots(self, slots: np.ndarray) -> jax.Array:
        """Slots [rows], counted within their parts, as `greedy.admit` takes them."""
        return parallel.put(slots.reshape(self._shards, -1), self.mesh, parallel.BATCH_AXES)

    def _prefix(self, trainable, frozen, prefix) -> tuple[Cache | None, np.int32]:
        """(keys and values of the prefix, its length), or (None, 0) without one."""
        if not prefix:
            return None, np.int32(0)
        rows = np.zeros((self._shards, padded_length(len(prefix))), np.int32)
        rows[:, : len(prefix)] = prefix
        rows, length = parallel.put(rows, self.mesh, parallel.BATCH_AXES), np.int32(len(prefix))
        return self._begin(trainable, frozen, rows, length), length

    def _layers(self, shared: Cache | None) -> Cache | None:
        """The prefix as `decode` takes it: of single layers where the slots are."""
        return jax.tree.map(tuple, shared) if self._by_layer else shared

    def _weights(self, trainable, frozen) -> list[tuple]:
        """The arrays as `decode` takes them: one pair, or a pair for each layer.

        A layer's weights are no copies: they lie in the stack's own memory.
        """
        if not self._by_layer:
            return [(trainable, frozen)]
        count = self._architecture[0].num_layers

        def views(path, array):
            if not parallel.path_name(path).startswith("layers/"):
                return (array,) * count
            stack = np.asarray(array)  # on the host itself a view, whatever the type
            return tuple(jax.device_put(stack[layer], may_alias=True) for layer in range(count))

        layers = []
        for tree in (trainable, frozen):
            leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
            columns = zip(*(views(*leaf) for leaf in leaves), strict=True)
            layers.append([structure.unflatten(column) for column in columns] or [tree] * count)
        return list(zip(*layers, strict=True))


def progress_bar(progress: str | tqdm | None, total: int):
    """A bar of that name for terminals, nothing without a name, or the caller's own bar."""
    if isinstance(progress, tqdm):
        return contextlib.nullcontext(progress)
    # None: shown in terminals only.
    disable = None if progress and parallel.is_main_process() else True
    return tqdm(total=total, desc=progress, unit="case", disable=disable)
