"""A loaded model as a notebook wants it: logits and greedy answers. Made by `radonc_jax.load`."""

from collections.abc import Sequence

import jax
import numpy as np

from radonc_jax.data.batches import encode_prompt
from radonc_jax.decoding.greedy import Generation
from radonc_jax.decoding.scheduler import Scheduler
from radonc_jax.decoding.text import generation
from radonc_jax.loading import load_model
from radonc_jax.models.decoder import Decoder, ModelConfig

LARGEST_BATCH = 32


class LanguageModel:
    """A model with its tokenizer; arguments and errors as those of `radonc_jax.load`.

    Attributes:
      config: the architecture.
      tokenizer: of the model's folder, from transformers.
    """

    def __init__(
        self,
        model: str,
        *,
        adapter: str | None = None,
        dtype: str = "bfloat16",
        quantize: str | None = None,
    ):
        self._loaded = load_model(model, adapter=adapter, dtype=dtype, quantized=quantize)
        self.config: ModelConfig = self._loaded.config
        self.tokenizer = self._loaded.tokenizer
        self._schedulers: dict[tuple, Scheduler] = {}
        partition = self._loaded.partition

        @jax.jit
        def logits(trainable, frozen, tokens, positions):
            model = partition.merge(trainable, frozen)
            return model.logits(model(tokens, positions)[0])

        self._logits = logits

    @property
    def model(self) -> Decoder:
        """The NNX module, on the loaded arrays themselves."""
        return self._loaded.partition.merge(self._loaded.trainable, self._loaded.frozen)

    def logits(self, tokens) -> jax.Array:
        """What the model expects next after each token.

        Args:
          tokens: int [B, T], rows of one length; nothing is added, not even BOS.

        Returns:
          float32 [B, T, V].

        Raises:
          ValueError: another rank, rows longer than the context, or ids outside the vocabulary.
        """
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(
                f"tokens must be integers [B, T], not {tokens.dtype} of shape {tokens.shape}"
            )
        self._check_ids(tokens)
        if tokens.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"rows of {tokens.shape[1]} tokens are longer than the model's context of "
                f"{self.config.max_position_embeddings}"
            )
        positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        return self._logits(
            self._loaded.trainable, self._loaded.frozen, tokens.astype(np.int32), positions
        )

    def generate(self, prompts: Sequence[str], max_new_tokens: int = 128) -> list[Generation]:
        """Greedy answers to texts, in order; each is what its prompt alone would get.

        Args:
          prompts: as a task renders them (`radonc_jax.tasks.TASKS["icd"].prompt(diagnosis)`).
          max_new_tokens: longest answer in tokens, the stop token included.

        Raises:
          ValueError: a prompt and its answer do not fit the context, or `prompts` is one string.
        """
        if isinstance(prompts, str):
            raise ValueError("prompts must be a list of strings, not one string")
        scheduler = self._scheduler(len(prompts), max_new_tokens, self._loaded.stops)
        encoded = [encode_prompt(self.tokenizer, prompt) for prompt in prompts]
        answers = scheduler(self._loaded.trainable, self._loaded.frozen, encoded)
        return [generation(self.tokenizer, answer) for answer in answers]

    def generate_tokens(
        self,
        token_lists: Sequence[Sequence[int]],
        max_new_tokens: int,
        eos: int | Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Greedy answers to token ids, in order; nothing is added, not even BOS.

        Args:
          token_lists: prompts of any lengths.
          max_new_tokens: longest answer, the stop token included.
          eos: id or ids that end an answer and are not part of it; None for those of the model's
            tokenizer and generation config, an empty sequence for none.

        Raises:
          ValueError: a prompt is empty, has ids outside the vocabulary, or does not fit the
            context together with its answer.
        """
        for tokens in token_lists:
            self._check_ids(np.asarray(tokens))
        if eos is None:
            stops = self._loaded.stops
        else:
            stops = (eos,) if isinstance(eos, (int, np.integer)) else tuple(eos)
        scheduler = self._scheduler(len(token_lists), max_new_tokens, stops)
        answers = scheduler(self._loaded.trainable, self._loaded.frozen, token_lists)
        return [answer.tokens for answer in answers]

    def _scheduler(self, rows: int, max_new_tokens: int, stops: Sequence[int]) -> Scheduler:
        # A few prompts are not made to pay for a full batch; powers of two keep compilations few.
        batch = min(LARGEST_BATCH, 1 << max(rows - 1, 0).bit_length())
        key = (batch, max_new_tokens, tuple(stops))
        if key not in self._schedulers:
            self._schedulers[key] = Scheduler(
                self._loaded.partition,
                self._loaded.mesh,
                batch=batch,
                max_new_tokens=max_new_tokens,
                stops=stops,
                context=self.config.max_position_embeddings,
            )
        return self._schedulers[key]

    def _check_ids(self, tokens: np.ndarray) -> None:
        # An array index outside its bounds is no error on a device: it reads another row.
        if tokens.size and (tokens.min() < 0 or tokens.max() >= self.config.vocab_size):
            raise ValueError(
                f"token ids must be from 0 to {self.config.vocab_size - 1}, the model's vocabulary"
            )
