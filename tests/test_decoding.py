"""Greedy decoding against transformers, against a slow reference, and against itself alone."""

import copy
import dataclasses
import functools
import itertools
import json
import logging
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from conftest import command_environment
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from radonc_jax import parallel
from radonc_jax.data.batches import trim_prompt
from radonc_jax.decoding import constrain, greedy
from radonc_jax.decoding import journal as journal_module
from radonc_jax.decoding.journal import Journal
from radonc_jax.decoding.scheduler import PREFILL_TOKENS, Scheduler
from radonc_jax.decoding.text import TextDecoder, shared_prefix
from radonc_jax.models import huggingface, lora, quantize, weight_files
from radonc_jax.parallel import MeshConfig, make_mesh, shardings
from radonc_jax.tasks import Task
from radonc_jax.training import preflight

# Threads that wait for each other cost more than such tiny products.
torch.set_num_threads(1)

VOCAB, PAD, BOS, EOS = 96, 0, 1, 2
SHAPE = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    rope_theta=5000.0,
    rms_norm_eps=1e-5,
    pad_token_id=PAD,
    bos_token_id=BOS,
    eos_token_id=EOS,
)
FAMILIES = ("llama", "mistral")
WINDOW = 7
LONGEST, NEW = 60, 12  # tokens of a prompt and of an answer
STOPS = (EOS, 11, 50)
ADAPTER = lora.LoRAConfig(4, 8.0, 0.1, ("q_proj", "down_proj"), False, False)


@dataclasses.dataclass(eq=False)
class Tiny:
    """A random model, in both libraries."""

    torch_model: transformers.PreTrainedModel
    config: object
    partition: lora.Partition
    trainable: object
    frozen: object

    def __post_init__(self):
        @jax.jit
        def logits(trainable, frozen, tokens, positions):
            model = self.partition.merge(trainable, frozen)
            return model.logits(model(tokens, positions)[0])[0]

        self._logits = logits

    def logits(self, tokens, trainable=None):
        """Of one text, [T, V], without a cache; what follows a token cannot change its logits."""
        padded = np.zeros((1, LONGEST + NEW), np.int32)
        padded[0, : len(tokens)] = tokens
        trainable = self.trainable if trainable is None else trainable
        positions = np.arange(padded.size)[None]
        logits = self._logits(trainable, self.frozen, padded, positions)
        return np.asarray(logits)[: len(tokens)]

    def slow_greedy(self, prompt, max_new_tokens=NEW, stops=STOPS, trainable=None):
        """No cache, no batch, no state: the whole text again for every token."""
        tokens = list(prompt)
        for _ in range(max_new_tokens):
            tokens.append(int(self.logits(tokens, trainable)[-1].argmax()))
            if tokens[-1] in stops:
                return tokens[len(prompt) : -1], True
        return tokens[len(prompt) :], False

    @functools.cache  # noqa: B019 - so that tests share what is compiled
    def scheduler(self, *, mesh=None, batch=8, max_new_tokens=NEW, stops=STOPS, context=256):
        mesh = one_device() if mesh is None else mesh
        return Scheduler(
            self.partition,
            mesh,
            batch=batch,
            max_new_tokens=max_new_tokens,
            stops=stops,
            context=context,
        )

    def decode(self, prompts, *, prefix=(), trie=None, trainable=None, **options):
        trainable = self.trainable if trainable is None else trainable
        scheduler = self.scheduler(**options)
        return scheduler(trainable, self.frozen, prompts, prefix=prefix, trie=trie)

    def placed(self, mesh):
        trees = (self.trainable, self.frozen)
        return tuple(jax.device_put(tree, shardings(tree, mesh)) for tree in trees)


def one_device():
    return make_mesh(MeshConfig(1, 1, 1), devices=jax.devices()[:1])


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request, tmp_path_factory):
    return build(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    return build("mistral", tmp_path_factory.mktemp("mistral"))


def build(family, folder):
    torch.manual_seed(FAMILIES.index(family))
    if family == "llama":
        config = transformers.LlamaConfig(**SHAPE)
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.MistralConfig(**SHAPE, sliding_window=WINDOW)
        model = transformers.MistralForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Far from the tiny initial values: answers that vary, attention that matters.
            if parameter.ndim == 2:
                parameter.mul_(6.0)
    model.eval()
    model.save_pretrained(folder, safe_serialization=True)
    ours = huggingface.read_config(folder)
    partition = lora.partition(ours, ADAPTER, jnp.float32)
    mesh = one_device()
    frozen = weight_files.load_weights(
        folder, partition.frozen, shardings(partition.frozen, mesh), jnp.float32, ours.num_layers
    )
    trainable = lora.init(partition.trainable, frozen, seed=0)
    return Tiny(model, ours, partition, trainable, frozen)


def ragged_prompts(count, seed=0, longest=32):
    """Prompts of 1 to `longest` tokens in which the padding and end ids occur as any other."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, count)
    lengths[:2] = 1, longest
    return [rng.integers(0, VOCAB, length).tolist() for length in lengths]


def transformers_greedy(model, prompt):
    """(tokens without the stop token, finished) by `generate` on the prompt alone."""
    tokens = torch.tensor([prompt])
    output = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=list(STOPS),
    )[0, len(prompt) :].tolist()
    finished = output[-1] in STOPS
    return (output[:-1] if finished else output), finished


def answers(results):
    return [(answer.tokens, answer.finished) for answer in results]


def assert_close_logprobs(results, expected):
    np.testing.assert_allclose([r[1] for r in results], [e[1] for e in expected], atol=1e-5)


def test_equals_transformers_generate(tiny):
    prompts = ragged_prompts(200)
    expected = [transformers_greedy(tiny.torch_model, prompt) for prompt in prompts]
    assert answers(tiny.decode(prompts)) == expected
    # That says something only if answers end in both ways, differ, and outgrow the window.
    assert {finished for _, finished in expected} == {True, False}
    assert len({tuple(tokens) for tokens, _ in expected}) > 100
    assert sum(len(prompt) > WINDOW for prompt in prompts) > 100


def test_equals_slow_reference(tiny):
    prompts = ragged_prompts(20, seed=3)
    assert answers(tiny.decode(prompts)) == [tiny.slow_greedy(prompt) for prompt in prompts]


def test_logprob_is_that_of_the_answer(tiny):
    prompts = ragged_prompts(20, seed=4)
    results = tiny.decode(prompts)
    assert {answer.finished for answer in results} == {True, False}
    for prompt, (tokens, logprob, finished, _) in zip(prompts, results, strict=True):
        logprobs = np.asarray(jax.nn.log_softmax(tiny.logits(prompt + tokens), axis=-1))
        predicted = logprobs[len(prompt) - 1 :]
        total = sum(predicted[i, token] for i, token in enumerate(tokens))
        if finished:
            assert predicted[-1].argmax() in STOPS
            total += predicted[-1].max()
        assert logprob == pytest.approx(total, abs=1e-5)


def test_the_gap_is_that_of_the_two_best_logits(tiny):
    prompts = ragged_prompts(10, seed=14)
    for prompt, answer in zip(prompts, tiny.decode(prompts), strict=True):
        logits = tiny.logits(prompt + answer.tokens)[len(prompt) - 1 :]
        logits = np.sort(logits[: len(answer.tokens) + answer.finished])
        assert answer.gap == pytest.approx((logits[:, -1] - logits[:, -2]).min(), abs=1e-5)


def test_an_answer_is_bit_for_bit_that_of_the_case_alone(mistral):
    """Whatever the slots, the order, the neighbours, the padding and the length of the cache."""
    prompts = ragged_prompts(40, seed=5)
    together = mistral.decode(prompts)
    alone = [0, 1, *range(2, 40, 6)]
    assert [mistral.decode([prompts[i]])[0] for i in alone] == [together[i] for i in alone]
    assert mistral.decode(prompts[::-1])[::-1] == together
    # More slots; and neighbours that need a longer cache and wider prefills.
    assert mistral.decode(prompts, batch=160) == together
    longer = ragged_prompts(2, seed=6, longest=LONGEST)
    assert mistral.decode(longer + prompts)[2:] == together


def test_an_adapter_of_any_rank_leaves_it_bit_for_bit(mistral):
    rng = np.random.default_rng(2)
    adapter = jax.tree.map(
        lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(leaf.dtype), mistral.trainable
    )
    decode = functools.partial(mistral.decode, trainable=adapter)
    prompts = ragged_prompts(40, seed=5)
    together = decode(prompts)
    assert answers(together) != answers(mistral.decode(prompts))
    assert [decode([prompt])[0] for prompt in prompts[::8]] == together[::8]
    assert decode(prompts, batch=160) == together


def test_a_shared_beginning_changes_no_answer(tiny):
    beginning = ragged_prompts(2, seed=15, longest=21)[1]
    others = ragged_prompts(30, seed=16)
    # Prompts that begin so, one that is nothing else, and some that do not begin so.
    prompts = [beginning + other for other in others[:20]] + [beginning] + others[20:]
    plain, results = tiny.decode(prompts), tiny.decode(prompts, prefix=beginning)
    assert answers(results) == answers(plain)
    assert_close_logprobs(results, plain)
    assert results != plain  # other sums, so other last bits; and a case alone has the same
    for number in (3, 7, 20, 25):
        assert tiny.decode(prompts[number : number + 1], prefix=beginning) == [results[number]]
    assert tiny.decode(prompts[::-1], prefix=beginning, batch=160)[::-1] == results


def test_what_rows_share_is_held_once(mistral):
    """The slots have places for the rest of the prompts and the answers alone."""
    scheduler, seen = mistral.scheduler(), []
    decode = scheduler._decode

    def watched(weights, state, shared, *rest):
        seen.append((state.cache.length, shared.length))
        return decode(weights, state, shared, *rest)

    scheduler._decode = watched
    try:
        beginning = ragged_prompts(2, seed=25, longest=150)[1]
        prompts = [beginning + other for other in ragged_prompts(10, seed=26)]
        results = scheduler(mistral.trainable, mistral.frozen, prompts, prefix=beginning)
    finally:
        scheduler._decode = decode
    assert set(seen) == {(64, 160)}
    assert answers(results) == answers(mistral.decode(prompts))


def test_more_prompts_than_slots_take_the_slots_that_fall_free(mistral, monkeypatch):
    """Steps on the device are counted at run time, and answers come as they finish."""
    scheduler = mistral.scheduler(batch=128)
    assert scheduler.batch == 128
    prompts = ragged_prompts(400, seed=12, longest=16)
    expected = mistral.decode(prompts)
    calls = []
    advance = greedy.advance

    def counted(*args):
        jax.debug.callback(lambda: calls.append(1))
        return advance(*args)

    monkeypatch.setattr(greedy, "advance", counted)
    scheduler = Scheduler(
        mistral.partition, one_device(), batch=128, max_new_tokens=NEW, stops=STOPS, context=256
    )
    # Four rows a prefill instead of all: the slots are then filled again and again.
    scheduler._fewest = 4
    scheduler._prefill_tokens = 64
    seen = []
    for number, answer in scheduler.stream(mistral.trainable, mistral.frozen, prompts):
        assert answer.tokens == expected[number].tokens
        seen.append(number)
    jax.effects_barrier()
    assert sorted(seen) == list(range(400)) and seen != list(range(400))
    lengths = [len(answer.tokens) + answer.finished for answer in expected]
    ideal = sum(lengths) / 128
    static = sum(max(lengths[start : start + 128]) for start in range(0, 400, 128))
    assert ideal <= len(calls) + 3 < 0.9 * static
    assert scheduler.steps == len(calls)


def test_answers_of_few_prompts_come_as_they_finish_too(mistral):
    """A killed process loses what it has not been given yet."""
    scheduler = mistral.scheduler(batch=128, stops=tuple(range(20)))  # they end at many lengths
    prompts = ragged_prompts(60, seed=27)
    before, steps = scheduler.steps, []
    for _ in scheduler.stream(mistral.trainable, mistral.frozen, prompts):
        steps.append(scheduler.steps - before)
    assert steps[0] < steps[-1] and len(set(steps)) > 2


def test_what_is_not_finite_in_one_row_reaches_no_later_one_of_its_slot(mistral):
    """A token whose embedding is not a number, in a long prompt that shorter ones come after."""
    frozen = jax.tree.map(lambda leaf: leaf, mistral.frozen)
    bad = VOCAB - 1
    frozen["embed_tokens"]["embedding"] = jax.tree.map(
        lambda leaf: leaf.at[bad].set(jnp.nan), frozen["embed_tokens"]["embedding"]
    )
    rng = np.random.default_rng(28)
    lengths = [60] * 64 + rng.integers(1, 20, 64).tolist()
    prompts = [rng.integers(0, bad, length).tolist() for length in lengths]
    for prompt in prompts[:64]:
        prompt[30] = bad
    scheduler = mistral.scheduler()
    assert scheduler.batch == 64
    results = scheduler(mistral.trainable, frozen, prompts)
    assert not np.isfinite([answer.logprob for answer in results[:64]]).any()
    expected = mistral.decode(prompts[64:])
    kept = [number for number, answer in enumerate(expected) if bad not in answer.tokens]
    assert len(kept) > 40
    assert [results[64 + number] for number in kept] == [expected[number] for number in kept]


@pytest.mark.slow
def test_a_wide_model_s_answers_are_bit_for_bit_those_of_the_case_alone():
    """Compiled as users compile, in prefills of 2 and of 8 rows; see bits.py."""
    environment = command_environment() | {"XLA_FLAGS": ""}
    command = [sys.executable, Path(__file__).parent / "bits.py"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    differing = json.loads(result.stdout)
    assert len(differing) == 3 and not any(differing.values()), differing


def test_filler_rows_emit_nothing(mistral):
    """One prompt and 127 empty slots: only its own answer comes, after its own steps."""
    prompts = ragged_prompts(30, seed=9)
    prompt = next(p for p in prompts if 0 < len(mistral.slow_greedy(p)[0]) < NEW - 1)
    assert answers(mistral.decode([prompt])) == [mistral.slow_greedy(prompt)]


def test_padding_and_end_ids_inside_a_prompt_are_tokens_like_others(mistral):
    prompts = [[BOS, PAD, PAD, 7], [BOS, 7, EOS, 9, EOS], [BOS, 7, PAD], [BOS, 7], [EOS], [PAD]]
    expected = [transformers_greedy(mistral.torch_model, prompt) for prompt in prompts]
    assert answers(mistral.decode(prompts)) == expected


def test_each_of_several_stop_tokens_ends_a_row(mistral):
    prompts = ragged_prompts(6, seed=7)
    free = mistral.decode(prompts, stops=())
    assert all(len(tokens) == NEW and not finished for tokens, _, finished, _ in free)
    stops = (free[0][0][0], free[1][0][4], free[2][0][-1])
    stopped = mistral.decode(prompts, stops=stops)
    for (tokens, *_), (cut, _, finished, _) in zip(free, stopped, strict=True):
        ends = [i for i, token in enumerate(tokens) if token in stops]
        assert cut == (tokens[: ends[0]] if ends else tokens)
        assert finished == bool(ends)
    assert stopped[0][0] == [] and stopped[0][2]


def test_a_stop_token_counts_among_the_new_tokens(mistral):
    longer = {tuple(p): mistral.slow_greedy(p, NEW + 1, ())[0] for p in ragged_prompts(30, seed=8)}
    # Two prompts of which one's last token and the other's first beyond the end stand nowhere
    # before: there they will stop.
    in_time, too_late, stops = next(
        (one, other, stops)
        for one, other in itertools.permutations(longer, 2)
        if not {*(stops := (longer[one][NEW - 1], longer[other][NEW]))}
        & {*longer[other][:NEW], *longer[one][: NEW - 1]}
    )
    late, early = longer[too_late], longer[in_time]
    results = mistral.decode([list(in_time), list(too_late)], stops=stops)
    assert answers(results) == [(early[: NEW - 1], True), (late[:NEW], False)]


def test_slots_are_shorter_once_the_long_prompts_are_done(mistral):
    scheduler, lengths = mistral.scheduler(), []
    decode = scheduler._decode

    def watched(weights, state, *rest):
        lengths.append(state.cache.length)
        return decode(weights, state, *rest)

    scheduler._decode = watched
    long, *short = ragged_prompts(3, seed=23, longest=220)[1:2] + ragged_prompts(200, seed=24)
    together = scheduler(mistral.trainable, mistral.frozen, [*short, long])
    assert lengths[0] >= len(long) + NEW and lengths[-1] == 64
    assert together == [*mistral.decode(short), *mistral.decode([long])]
    # Where few are to come, another length is not worth its compilation.
    lengths.clear()
    scheduler(mistral.trainable, mistral.frozen, [*short[: scheduler.batch], long])
    assert len(set(lengths)) == 1


def test_compiles_once_per_shape(mistral):
    scheduler = mistral.scheduler(batch=256)  # a size that no other test has compiled
    rng = np.random.default_rng(0)

    def compilations(*lengths, frozen=mistral.frozen):
        prompts = [rng.integers(0, VOCAB, length).tolist() for length in lengths]
        with CountCompilations() as count:
            scheduler(mistral.trainable, frozen, prompts)
        return count.of("admit"), count.of("decode")

    assert compilations(3, 16, 7) == (1, 1)
    assert compilations(1) == (0, 0)
    assert compilations(17, 30, 32, 25, 20) == (1, 0)
    # New weights of the same shapes are new arguments, not a new program.
    scaled = jax.tree.map(lambda leaf: leaf * 1.5, mistral.frozen)
    assert compilations(12, 4, frozen=scaled) == (0, 0)


class CountCompilations(logging.Handler):
    """Reads what JAX logs when it compiles."""

    def __enter__(self):
        self.messages = []
        self.logger = logging.getLogger("jax._src.interpreters.pxla")
        self.logger.addHandler(self)
        self.context = jax.log_compiles()
        self.context.__enter__()
        return self

    def __exit__(self, *error):
        self.context.__exit__(*error)
        self.logger.removeHandler(self)

    def emit(self, record):
        self.messages.append(record.getMessage())

    def of(self, name):
        return sum(f"Compiling jit({name})" in message for message in self.messages)


def with_room(mistral, tokens, batch, shards=1):
    """A scheduler that can only plan, for slots and prefills of that size."""
    scheduler = copy.copy(mistral.scheduler(batch=64))
    scheduler._fewest, scheduler._shards = 2, shards  # as for a model whose rows are long enough
    scheduler.batch, scheduler._prefill_tokens = batch, PREFILL_TOKENS[tokens]
    return scheduler


@pytest.mark.parametrize("prefix", [130, 0])
@pytest.mark.parametrize("logarithm", [4.6, 3.5, 2.8])
@pytest.mark.parametrize(
    ("tokens", "batch", "shards"), [("cpu", 32, 1), ("gpu", 256, 1), ("gpu", 256, 8)]
)
def test_prefills_are_padded_by_twelve_percent_at_most_in_a_few_shapes(
    mistral, tokens, batch, shards, logarithm, prefix
):
    """Of the 1,581 cases of a test split, with lengths as those of diagnoses, long or short."""
    scheduler = with_room(mistral, tokens, batch, shards)
    rng = np.random.default_rng(0)

    def draw(count):
        return np.clip(rng.lognormal(logarithm, 0.5, count), 3, 600).astype(int)

    lengths = draw(1581).tolist()
    prompts = [[1] * 130 + [0] * length for length in lengths]
    groups = scheduler._groups(prompts, [1] * prefix)
    assert sorted(number for group, *_ in groups for number in group) == list(range(1581))
    asked = sum(lengths) + (130 - prefix) * 1581
    run = sum(rows * width for _, _, rows, width in groups)
    assert asked <= run <= 1.12 * asked
    for group, shared, rows, width in groups:
        assert shared == bool(prefix) and len(group) <= rows <= batch and rows % shards == 0
        assert max(lengths[number] + 130 - prefix for number in group) <= width
    assert len({group[1:] for group in groups}) <= (16 if prefix else 8)
    # The next prompts are run in the same shapes, or nearly; short ones in many of them.
    used = {group[1:] for group in groups}
    more = [[1] * 130 + [0] * length for length in draw(2048).tolist()]
    again = scheduler._groups(more, [1] * prefix, used)
    assert len({group[1:] for group in again} - used) <= (2 if logarithm > 4 else 8)


def test_prompts_of_both_kinds_are_planned_apart(mistral):
    scheduler = with_room(mistral, "gpu", 256)
    prefix = [1] * 50
    prompts = [prefix + [0] * 12] * 5 + [[0] * 500] * 40 + [prefix]
    groups = scheduler._groups(prompts, prefix)
    assert groups[0][1] and all(not shared for _, shared, *_ in list(groups)[1:])
    assert [len(group) for group, shared, *_ in groups if shared] == [5]
    assert sum(len(group) for group, shared, *_ in groups if not shared) == 41
    assert groups[0][2:] == (8, 16)  # no full prefill for a few prompts


@pytest.mark.parametrize(
    ("by_layer", "kind"),
    [(True, None), (False, None), (True, "bfloat16"), (True, "int8"), (True, "nf4")],
)
def test_the_compiled_step_copies_no_cache_and_no_weights(mistral, by_layer, kind):
    """Of a model whose smallest matrix is larger than whatever else there is to copy."""
    config = dataclasses.replace(
        mistral.config, hidden_size=512, intermediate_size=512, head_dim=64
    )
    adapter = lora.LoRAConfig(4, 8.0, 0.0, ("q_proj",), False, False)
    dtype = jnp.bfloat16 if kind == "bfloat16" else jnp.float32
    partition = lora.partition(config, adapter, dtype, kind if kind in quantize.KINDS else None)
    floating = jnp.dtype(dtype if kind == "bfloat16" else jnp.float32)
    trainable, frozen = (
        jax.tree.map(
            lambda leaf: jnp.zeros(
                leaf.shape, floating if leaf.dtype == jnp.float32 else leaf.dtype
            ),
            tree,
        )
        for tree in (partition.trainable, partition.frozen)
    )
    scheduler = Scheduler(
        partition, one_device(), batch=8, max_new_tokens=NEW, stops=STOPS, context=256
    )
    scheduler._by_layer = by_layer
    scheduler._compile()
    with jax.set_mesh(scheduler.mesh):
        weights = scheduler._weights(trainable, frozen)
        state = scheduler._empty(*scheduler._architecture, 192)
        shared, begun = scheduler._prefix(trainable, frozen, [5] * 9)
        compiled = scheduler._decode.lower(
            weights, state, scheduler._layers(shared), np.int32(8), np.int32(8), None
        ).compile()
        given = parallel.put((np.zeros((8, 32), np.int32), np.ones(8, np.int32)), scheduler.mesh)
        admitted = scheduler._admit.lower(
            trainable, frozen, state, shared, begun, *given,
            np.arange(8, dtype=np.int32)[None], None,
        ).compile()  # fmt: skip
    layers = jax.tree.leaves(state.cache)
    smallest = config.num_kv_heads * config.head_dim * config.hidden_size
    assert smallest < layers[0].size / (1 if by_layer else config.num_layers)
    for program in (compiled, admitted):
        # Donated: the cache comes out, before all else, where the one that went in lay.
        head = program.as_text().splitlines()[0]
        aliased = {int(number) for number in re.findall(r"\{(\d+)\}: \(\d+, \{\}, m", head)}
        assert {*range(len(layers))} <= aliased, head
    copied = [
        math.prod(map(int, shape.split(",")))
        for shape in re.findall(r"= \w+\[([\d,]+)\][^ ]* copy\(", compiled.as_text())
    ]
    assert all(count < smallest for count in copied), copied
    if kind is not None or not by_layer:
        return  # a CPU turns them into float32 once a call
    heads = config.head_dim * (config.num_heads + config.num_kv_heads)
    kernels = config.num_layers * config.hidden_size * (2 * heads + 3 * config.intermediate_size)
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * kernels / 2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_on_a_cpu_each_layer_s_weights_are_read_where_the_loader_put_them(mistral, dtype):
    """No second copy of the base, in the training loop least of all."""
    base = jax.tree.map(lambda leaf: leaf.astype(dtype), mistral.frozen)
    weights = mistral.scheduler()._weights(mistral.trainable, base)
    for name, module in (("up_proj", "mlp"), ("q_proj", "self_attn")):
        stack = jax.tree.leaves(base["layers"][module][name])[0]
        for number, (_, frozen) in enumerate(weights):
            view = jax.tree.leaves(frozen["layers"][module][name])[0]
            offset = view.unsafe_buffer_pointer() - stack.unsafe_buffer_pointer()
            assert view.dtype == dtype and offset == number * stack[0].nbytes


@pytest.mark.parametrize(
    "mesh_config", [MeshConfig(8, 1, 1), MeshConfig(2, 2, 2)], ids=["data", "all three"]
)
def test_eight_devices_give_the_same_answers(mistral, mesh_config):
    prompts = ragged_prompts(43, seed=10)
    expected = mistral.decode(prompts)
    mesh = make_mesh(mesh_config, devices=jax.devices()[:8])
    scheduler = mistral.scheduler(mesh=mesh, batch=3)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    assert scheduler.batch == max(-(-3 // shards), 2) * shards < len(prompts)
    beginning = ragged_prompts(2, seed=15, longest=21)[1]
    placed = mistral.placed(mesh)
    results = scheduler(*placed, prompts)
    assert answers(results) == answers(expected)
    assert_close_logprobs(results, expected)
    longer = [beginning + prompt for prompt in prompts]
    results = scheduler(*placed, longer, prefix=beginning)
    expected = mistral.decode(longer)
    assert answers(results) == answers(expected)
    assert_close_logprobs(results, expected)
    # Labels that are scored, and answers from a closed set.
    labels = [[5, 7, EOS], [8, EOS]]

    def score(scheduler, trainable, frozen):
        found = dict(scheduler.score(trainable, frozen, longer, labels, prefix=beginning))
        return [found[number] for number in range(len(longer))]

    alone = score(mistral.scheduler(), mistral.trainable, mistral.frozen)
    np.testing.assert_allclose(score(scheduler, *placed), alone, atol=1e-5)
    trie = constrain.build_trie(labels)
    results = scheduler(*placed, longer, prefix=beginning, trie=trie)
    assert answers(results) == answers(mistral.decode(longer, trie=trie))


def test_a_prefill_runs_the_head_at_the_last_position_alone(mistral):
    scheduler, (rows, width) = mistral.scheduler(), (5, 48)
    with jax.set_mesh(scheduler.mesh):
        state = scheduler._empty(*scheduler._architecture, 64)
        tokens = scheduler._rows([[3] * 40], [0] * rows, 0, width)
        slots = scheduler._slots(np.arange(rows))
        begun = None, np.int32(0)
        arrays = mistral.trainable, mistral.frozen, state, *begun, *tokens, slots, None
        program = scheduler._admit.lower(*arrays).compile().as_text()
    sizes = {
        math.prod(map(int, shape.split(",")))
        for shape in re.findall(r"f32\[([\d,]+)\]", program)
        if str(VOCAB) in shape.split(",")
    }
    assert rows * VOCAB in sizes and rows * width * VOCAB not in sizes


def test_between_devices_that_share_a_batch_no_keys_and_values_move(mistral):
    """A step asks how many rows are done, and at the end every device is told all rows' answers."""
    mesh = make_mesh(MeshConfig(8, 1, 1), devices=jax.devices()[:8])
    scheduler = mistral.scheduler(mesh=mesh, batch=32)
    placed = mistral.placed(mesh)
    with jax.set_mesh(mesh):
        state = scheduler._empty(*scheduler._architecture, 192)
        beginning = scheduler._prefix(*placed, [5] * 9)
        given = (np.zeros((16, 32), np.int32), np.ones(16, np.int32), np.zeros((8, 2), np.int32))
        given = parallel.put(given, mesh, parallel.BATCH_AXES)
        for begun in ((None, np.int32(0)), beginning):
            admitted = scheduler._admit.lower(*placed, state, *begun, *given, None).compile()
            assert preflight.collectives(admitted.as_text()) == []
        weights = scheduler._weights(*placed)
        limits = np.int32(32), np.int32(4)
        decoded = scheduler._decode.lower(weights, state, beginning[0], *limits, None).compile()
    moved = preflight.collectives(decoded.as_text())
    assert ("all-reduce", 4) in moved
    moved.remove(("all-reduce", 4))
    rows = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.rows))
    assert {kind for kind, _ in moved} == {"all-gather"} and sum(size for _, size in moved) <= rows
    inside = [line for line in decoded.as_text().splitlines() if "while/body" in line]
    assert inside and preflight.collectives("\n".join(inside)) == []


def test_the_adapter_is_used(mistral):
    adapter = jax.tree.map(lambda leaf: leaf + 0.3, mistral.trainable)
    prompts = ragged_prompts(5, seed=11)
    tuned = mistral.decode(prompts, trainable=adapter)
    assert answers(tuned) == [mistral.slow_greedy(p, trainable=adapter) for p in prompts]
    assert answers(tuned) != answers(mistral.decode(prompts))


def test_too_long_prompts_are_counted_before_anything_runs(mistral):
    prompts = [[5] * 244, [5] * 245, [5] * 250, [5]]
    with pytest.raises(ValueError, match=r"2 of 4 prompts .* longest has 250 .* leaves 244") as e:
        mistral.decode(prompts)
    assert "5, 5" not in str(e.value)
    # The longest that fits does, in a bucket cut at the context.
    expected = transformers_greedy(mistral.torch_model, prompts[0])
    assert answers(mistral.decode(prompts[:1])) == [expected]


def test_bad_arguments(mistral):
    with pytest.raises(ValueError, match="1 of 2 prompts are empty"):
        mistral.decode([[], [3]])
    with pytest.raises(ValueError, match="at least 1"):
        mistral.scheduler(batch=0)
    with pytest.raises(ValueError, match="at least 1"):
        mistral.scheduler(max_new_tokens=0)
    with pytest.raises(ValueError, match="leaves no room"):
        mistral.scheduler(max_new_tokens=40, context=40)
    assert mistral.decode([]) == []


def test_a_trie_holds_its_sequences_and_no_others():
    rng = np.random.default_rng(0)
    sequences = {(*rng.integers(3, 7, rng.integers(1, 6)).tolist(), EOS) for _ in range(200)}
    trie = constrain.build_trie(sequences)
    found, paths = set(), [(0, ())]
    while paths:
        node, path = paths.pop()
        tokens, children, real = (np.asarray(x)[0] for x in trie.children(np.array([node])))
        if not real.any():
            found.add(path)
        paths += [(c, (*path, int(t))) for t, c in zip(tokens[real], children[real], strict=True)]
    assert found == sequences
    assert trie.depth == max(map(len, sequences))
    with pytest.raises(ValueError, match="beginning of another"):
        constrain.build_trie([(5, EOS), (5, EOS, 4)])
    with pytest.raises(ValueError, match="needs sequences"):
        constrain.build_trie([])


def test_constrained_answers_are_the_likeliest_allowed_ones_step_by_step(tiny):
    rng = np.random.default_rng(1)
    allowed = {tuple(rng.integers(3, 12, rng.integers(1, 6)).tolist()) for _ in range(60)}
    trie = constrain.build_trie([(*sequence, EOS) for sequence in allowed])
    prompts = ragged_prompts(20, seed=17)
    results = tiny.decode(prompts, trie=trie, stops=(EOS,))
    for prompt, answer in zip(prompts, results, strict=True):
        tokens, logprob, gap = (), 0.0, np.inf
        while not tokens or tokens[-1] != EOS:
            following = sorted(
                {(*s, EOS)[len(tokens)] for s in allowed if s[: len(tokens)] == tokens}
            )
            logits = tiny.logits([*prompt, *tokens])[-1]
            scores = logits[following]
            if len(scores) > 1:
                gap = min(gap, np.diff(np.sort(scores)[-2:])[0])
            logprob += float(jax.nn.log_softmax(logits)[following[scores.argmax()]])
            tokens = (*tokens, following[scores.argmax()])
        assert (*answer.tokens, EOS) == tokens and answer.finished
        assert tuple(answer.tokens) in allowed
        assert answer.logprob == pytest.approx(logprob, abs=1e-5)
        assert answer.gap == pytest.approx(gap, abs=1e-5)
    assert len({tuple(answer.tokens) for answer in results}) > 5


def test_scores_of_labels_are_the_log_probabilities_of_their_tokens(tiny):
    labels = [(7, EOS), (7, 8, 9, EOS), (20, 4, EOS)]
    beginning = ragged_prompts(2, seed=15, longest=21)[1]
    prompts = [beginning + other for other in ragged_prompts(12, seed=18)]
    scheduler = tiny.scheduler()
    scored = dict(scheduler.score(tiny.trainable, tiny.frozen, prompts, labels, prefix=beginning))
    assert sorted(scored) == list(range(len(prompts)))
    for number, prompt in enumerate(prompts):
        for label, score in zip(labels, scored[number], strict=True):
            logprobs = jax.nn.log_softmax(tiny.logits([*prompt, *label]), axis=-1)
            expected = sum(
                float(logprobs[len(prompt) - 1 + place, token]) for place, token in enumerate(label)
            )
            assert score == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="longest label has 13 tokens"):
        list(scheduler.score(tiny.trainable, tiny.frozen, prompts, [(5,) * 13]))


class LetterTokenizer:
    """One id per letter; as some real ones, it would add a second BOS if it were asked to."""

    bos_token_id, eos_token_id = BOS, EOS

    def encode(self, text, add_special_tokens=True):
        return [BOS] * add_special_tokens + [3 + ord(letter) % 90 for letter in text]

    def decode(self, tokens, skip_special_tokens=False):
        kept = [t for t in tokens if not skip_special_tokens or t > EOS]
        return " " + "".join(chr(48 + token) for token in kept) + "\n"


class Question(Task):
    name, instruction = "question", "Say."

    def reference(self, record):
        return record.icd10

    def parse(self, output):
        return output


def text_decoder(tiny, **options):
    return TextDecoder(tiny.scheduler(), LetterTokenizer(), tiny.trainable, tiny.frozen, **options)


def test_text_is_encoded_with_one_bos_and_answers_are_stripped(mistral):
    tokenizer, task = LetterTokenizer(), Question()
    texts = ["left breast", "prostate", "left breast"]
    prompts = [[BOS, *tokenizer.encode(task.prompt(t), add_special_tokens=False)] for t in texts]
    prefix = shared_prefix(tokenizer, task)
    assert prefix == tuple(prompts[0][: len(prefix)]) and len(prefix) > len("Say.")
    expected = mistral.decode(prompts, prefix=prefix)
    generations = text_decoder(mistral)(task, texts)
    assert [(g.tokens, g.logprob, g.finished, g.gap) for g in generations] == expected
    assert [g.text for g in generations] == [
        tokenizer.decode(a.tokens, skip_special_tokens=True).strip() for a in expected
    ]


def test_a_prompt_that_does_not_fit_is_refused_or_cut_as_in_training_and_flagged(mistral):
    tokenizer, task = LetterTokenizer(), Question()
    texts = ["word " * 60, "short"]
    with pytest.raises(ValueError, match="1 of 2 prompts are too long"):
        text_decoder(mistral)(task, texts)
    cut, whole = text_decoder(mistral, over_length="trim_diagnosis")(task, texts)
    assert (cut.trimmed, whole.trimmed) == (True, False)
    prompt = trim_prompt(tokenizer, task, texts[0], mistral.scheduler().room)
    assert mistral.decode([prompt])[0].tokens == cut.tokens


def test_answers_are_kept_as_they_finish_and_never_taken_from_another_source(
    mistral, tmp_path, monkeypatch
):
    path, task = tmp_path / "journal", Question()
    texts = [f"case {number}" for number in range(6)]
    quiet = text_decoder(mistral)(task, texts)
    ran = []

    def decode(texts, source):
        journal = Journal(path, source)
        decoder = text_decoder(mistral, journal=journal)
        stream = decoder.scheduler.stream

        def counted(trainable, frozen, prompts, **options):
            ran.append(len(prompts))
            return stream(trainable, frozen, prompts, **options)

        decoder = dataclasses.replace(decoder, scheduler=copy.copy(decoder.scheduler))
        decoder.scheduler.stream = counted
        result = decoder(task, texts)
        journal.close()
        return result

    assert decode(texts[:4], {"adapter": "one"}) == quiet[:4]
    assert decode(texts, {"adapter": "one"}) == quiet
    # The line in which a process was killed is no answer.
    content = path.read_bytes()
    path.write_bytes(content[:-5])
    assert decode(texts, {"adapter": "one"}) == quiet
    assert sorted(path.read_bytes().splitlines()) == sorted(content.splitlines())
    assert decode(texts, {"adapter": "another"}) == quiet
    monkeypatch.setattr(journal_module, "FORMAT", journal_module.FORMAT + 1)
    assert decode(texts, {"adapter": "another"}) == quiet
    assert ran == [4, 2, 1, 6, 6]


def test_a_journal_that_stays_drops_what_no_question_looked_up(tmp_path):
    path, entry = tmp_path / "journal", {"tokens": [1], "logprob": -0.5}

    def questions(source, prompts, drop=True):
        journal = Journal(path, source)
        new = []
        for prompt in prompts:
            key = journal.key([prompt], "")
            if journal.get(key) is None:
                journal.add(key, entry)
                new.append(prompt)
        if drop:
            journal.drop_others()
        journal.add(journal.key([9], ""), entry)  # it goes on
        journal.close()
        return new

    assert questions({"step": 1}, range(5)) == [0, 1, 2, 3, 4]
    assert questions({"step": 2}, range(3), drop=False) == [0, 1, 2]
    assert len(path.read_bytes().splitlines()) == 10
    assert questions({"step": 2}, range(1, 5)) == [3, 4]
    assert len(path.read_bytes().splitlines()) == 5
    assert questions({"step": 2}, [1, 2, 3, 4, 9]) == []
    assert questions({"step": 1}, [0]) == [0]
    assert [path.name for path in tmp_path.iterdir()] == ["journal"]


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_base_answers_as_its_slow_reference(mistral, kind, tmp_path):
    mistral.torch_model.save_pretrained(tmp_path)
    partition = lora.partition(mistral.config, ADAPTER, jnp.float32, kind)
    frozen = weight_files.load_weights(
        tmp_path,
        partition.frozen,
        shardings(partition.frozen, one_device()),
        jnp.float32,
        mistral.config.num_layers,
    )
    trainable = lora.init(partition.trainable, frozen, seed=0)
    trainable = jax.tree.map(lambda leaf: leaf + 0.05, trainable)
    model = Tiny(mistral.torch_model, mistral.config, partition, trainable, frozen)
    prompts = ragged_prompts(8, seed=19)
    expected = [model.slow_greedy(prompt) for prompt in prompts]
    assert answers(model.decode(prompts)) == expected
    assert answers(mistral.decode(prompts, trainable=trainable)) != expected
    # And so they do where the heads, and the codes, are shared out over devices.
    mesh = make_mesh(MeshConfig(2, 2, 2), devices=jax.devices()[:8])
    placed = model.placed(mesh)
    assert any(
        "tensor" in str(leaf.sharding.spec) and leaf.dtype in (jnp.int8, jnp.uint8)
        for leaf in jax.tree.leaves(placed)
    )
    assert answers(model.scheduler(mesh=mesh)(*placed, prompts)) == expected


def test_answers_of_another_batch_mesh_or_tokenizer_are_of_another_source():
    def source(batch=8, data=1, words=("left", "right")):
        tokenizer = Tokenizer(
            WordLevel({word: i for i, word in enumerate(words)}, unk_token="left")
        )
        mesh = jax.make_mesh((data,), ("data",), devices=jax.devices()[:data])
        scheduler = SimpleNamespace(mesh=mesh, batch=batch, max_new_tokens=4, stops=(2,))
        backend = SimpleNamespace(backend_tokenizer=tokenizer)
        return TextDecoder(scheduler, backend, None, None).source()

    assert source() == source() == json.loads(json.dumps(source()))
    others = source(batch=16), source(data=2), source(words=("right", "left"))
    assert all(other != source() for other in others)
