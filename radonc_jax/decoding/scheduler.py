"""From prompts of any number and length to full batches of few shapes, and back in order.

The host's half of decoding. Prompts of like length are decoded together, so that little of a batch
is padding, and lengths are rounded up to a few sizes, each of which is compiled once.
"""

import contextlib
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from radonc_jax import parallel
from radonc_jax.data.batches import encode_prompt
from radonc_jax.decoding.greedy import Generation, greedy
from radonc_jax.models.lora import Partition

LENGTH_STEP = 32


def padded_length(length: int) -> int:
    """`length` rounded up to a multiple of 32, or of a sixteenth of the next power of two.

    Below 256 tokens padding costs at most 31 tokens, above it at most an eighth, with eight shapes
    for each doubling.
    """
    step = max(LENGTH_STEP, 2 ** (length - 1).bit_length() // 16) if length else LENGTH_STEP
    return -(-length // step) * step


class Scheduler:
    """Decodes lists of prompts with one model on one mesh.

    Keep one and call it again: each length bucket is compiled at its first use only.

    Args:
      partition: the model without its arrays.
      mesh: the arrays' mesh; the rows of a batch are spread over its data and fsdp axes.
      batch: rows decoded together, rounded up to what the mesh divides.
      max_new_tokens: longest answer, the stop token included.
      stops: token ids that end an answer.
      context: positions that the model has (`max_position_embeddings`).

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
        shards = int(np.prod([mesh.shape[axis] for axis in parallel.BATCH_AXES]))
        self.mesh = mesh
        self.batch = -(-batch // shards) * shards
        self.max_new_tokens = max_new_tokens
        self.context = context
        stops = tuple(int(stop) for stop in stops)

        def decode(trainable, frozen, tokens, lengths):
            model = partition.merge(trainable, frozen)
            return greedy(model, tokens, lengths, max_new_tokens=max_new_tokens, stops=stops)

        # Weights are arguments: as constants they would be copied into every compiled shape.
        # Answers come back whole to every process, which then all know the same.
        self._decode = jax.jit(decode, out_shardings=parallel.replicated(mesh))

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
        progress: str | tqdm | None = None,
    ) -> list[tuple[list[int], float, bool]]:
        """Decodes every prompt; in a run of several processes all of them call it alike.

        Args:
          trainable, frozen: the arrays of `partition`, placed on the mesh.
          prompts: token ids, each beginning with BOS where the model wants one.
          progress: name of a progress bar, or the caller's own, which is moved on by each
            answer; None for no bar.

        Returns:
          (tokens without the stop token, logprob, finished) for each prompt, in order.

        Raises:
          ValueError: as `check`.
        """
        self.check(prompts)
        results: list = [None] * len(prompts)
        # Longest first: if memory does not suffice, that shows at once.
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        if isinstance(progress, tqdm):
            own = contextlib.nullcontext(progress)
        else:
            # None: shown in terminals only.
            disable = None if progress and parallel.is_main_process() else True
            own = tqdm(total=len(prompts), desc=progress, unit="case", disable=disable)
        with own as bar, jax.set_mesh(self.mesh):
            for start in range(0, len(order), self.batch):
                chosen = order[start : start + self.batch]
                rows = self._decode_rows(trainable, frozen, [prompts[i] for i in chosen])
                for i, row in zip(chosen, rows, strict=True):
                    results[i] = row
                bar.update(len(chosen))
        return results

    def _decode_rows(self, trainable, frozen, prompts):
        """One batch, filled up with empty rows at its end."""
        longest = max(len(prompt) for prompt in prompts)
        width = min(padded_length(longest), self.room)
        tokens = np.zeros((self.batch, width), np.int32)
        lengths = np.zeros(self.batch, np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
            lengths[row] = len(prompt)
        tokens, lengths = parallel.put((tokens, lengths), self.mesh, parallel.BATCH_AXES)
        output = self._decode(trainable, frozen, tokens, lengths)
        answers, counts, logprobs, finished = jax.device_get(output)
        return [
            (answers[row, : counts[row]].tolist(), float(logprobs[row]), bool(finished[row]))
            for row in range(len(prompts))
        ]


def text_decoder(
    scheduler: Scheduler, tokenizer, trainable, frozen, *, progress: str | tqdm | None = None
) -> Callable[[Sequence[str]], list[Generation]]:
    """The scheduler as a function of texts: prompts in, answers out, in order.

    Prompts are encoded as for training (`data.batches.encode_prompt`).
    """

    def decode(prompts: Sequence[str]) -> list[Generation]:
        encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
        answers = scheduler(trainable, frozen, encoded, progress=progress)
        return [
            Generation(
                text=tokenizer.decode(tokens, skip_special_tokens=True).strip(),
                tokens=tokens,
                logprob=logprob,
                finished=finished,
            )
            for tokens, logprob, finished in answers
        ]

    return decode
