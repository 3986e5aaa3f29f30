"""Greedy decoding against transformers, against a slow reference, and against itself alone."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from radonc_jax.decoding.greedy import greedy
from radonc_jax.decoding.scheduler import Scheduler, padded_length, text_decoder
from radonc_jax.models import huggingface, lora, weight_files
from radonc_jax.parallel import MeshConfig, make_mesh, shardings

# Threads that wait for each other cost more than such tiny products.
torch.set_num_threads(1)

VOCAB, PAD, BOS, EOS = 96, 0, 1, 2
SHAPE = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
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

        @jax.jit
        def decode(trainable, frozen, tokens, lengths):
            model = self.partition.merge(trainable, frozen)
            return greedy(model, tokens, lengths, max_new_tokens=NEW, stops=STOPS)

        self._logits, self._greedy = logits, decode

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

    def decode(self, prompts, **options):
        return self.scheduler(**options)(self.trainable, self.frozen, prompts)

    def greedy(self, tokens, lengths):
        """`greedy` itself, without a scheduler around it."""
        return self._greedy(self.trainable, self.frozen, tokens, np.asarray(lengths))

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
                parameter.mul_(8.0)
    model.eval()
    model.save_pretrained(folder, safe_serialization=True)
    ours = huggingface.read_config(folder)
    adapter = lora.LoRAConfig(4, 8.0, 0.1, ("q_proj", "down_proj"), False, False)
    partition = lora.partition(ours, adapter, jnp.float32)
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
    return [(tokens, finished) for tokens, _, finished in results]


def assert_close_logprobs(results, expected):
    np.testing.assert_allclose([r[1] for r in results], [e[1] for e in expected], atol=1e-5)


def test_equals_transformers_generate(tiny):
    prompts = ragged_prompts(60)
    expected = [transformers_greedy(tiny.torch_model, prompt) for prompt in prompts]
    assert answers(tiny.decode(prompts)) == expected
    # That says something only if answers end in both ways, differ, and outgrow the window.
    assert {finished for _, finished in expected} == {True, False}
    assert len({tuple(tokens) for tokens, _ in expected}) > 30
    assert sum(len(prompt) > WINDOW for prompt in prompts) > 30


def test_equals_slow_reference(tiny):
    prompts = ragged_prompts(20, seed=3)
    assert answers(tiny.decode(prompts)) == [tiny.slow_greedy(prompt) for prompt in prompts]


def test_logprob_is_that_of_the_answer(tiny):
    prompts = ragged_prompts(20, seed=4)
    results = tiny.decode(prompts)
    assert {finished for _, _, finished in results} == {True, False}
    for prompt, (tokens, logprob, finished) in zip(prompts, results, strict=True):
        logprobs = np.asarray(jax.nn.log_softmax(tiny.logits(prompt + tokens), axis=-1))
        predicted = logprobs[len(prompt) - 1 :]
        total = sum(predicted[i, token] for i, token in enumerate(tokens))
        if finished:
            assert predicted[-1].argmax() in STOPS
            total += predicted[-1].max()
        assert logprob == pytest.approx(total, abs=1e-5)


def test_answer_is_that_of_the_case_alone(mistral):
    prompts = ragged_prompts(30, seed=5, longest=LONGEST)
    alone = [mistral.decode([prompt], batch=1)[0] for prompt in prompts]
    # In the batch of 32 all rows share the longest one's bucket, alone most have a smaller one.
    together = mistral.decode(prompts, batch=32)
    assert answers(together) == answers(alone)
    assert_close_logprobs(together, alone)
    reordered = mistral.decode(prompts[::-1], batch=32)
    assert answers(reordered) == answers(alone)[::-1]


def test_answer_does_not_depend_on_the_width_or_the_padding(mistral):
    prompt = ragged_prompts(3, seed=6)[1][:20]
    outputs = []
    for width, fill in ((20, 0), (32, PAD), (32, EOS), (32, 5)):
        tokens = np.full((2, width), fill, np.int32)
        tokens[0, :20] = prompt
        answer, counts, _, finished = mistral.greedy(tokens, [20, 3])
        outputs.append((answer[0, : counts[0]].tolist(), bool(finished[0])))
    assert outputs == [mistral.slow_greedy(prompt)] * 4


def test_filler_rows_emit_nothing_and_do_not_hold_up_the_batch(mistral):
    prompts = ragged_prompts(30, seed=9)
    prompt = next(p for p in prompts if 0 < len(mistral.slow_greedy(p)[0]) < NEW - 1)
    tokens = np.full((2, 32), 5, np.int32)
    tokens[1, : len(prompt)] = prompt
    output, counts, logprob, finished = mistral.greedy(tokens, [0, len(prompt)])
    assert (counts[0], logprob[0], finished[0]) == (0, 0, False)
    assert (output[1, : counts[1]].tolist(), bool(finished[1])) == mistral.slow_greedy(prompt)
    assert not output[0].any() and not output[1, counts[1] :].any()


def test_padding_and_end_ids_inside_a_prompt_are_tokens_like_others(mistral):
    prompts = [[BOS, PAD, PAD, 7], [BOS, 7, EOS, 9, EOS], [BOS, 7, PAD], [BOS, 7], [EOS], [PAD]]
    expected = [transformers_greedy(mistral.torch_model, prompt) for prompt in prompts]
    assert answers(mistral.decode(prompts)) == expected


def test_each_of_several_stop_tokens_ends_a_row(mistral):
    prompts = ragged_prompts(6, seed=7)
    free = mistral.decode(prompts, stops=())
    assert all(len(tokens) == NEW and not finished for tokens, _, finished in free)
    stops = (free[0][0][0], free[1][0][4], free[2][0][-1])
    stopped = mistral.decode(prompts, stops=stops)
    for (tokens, _, _), (cut, _, finished) in zip(free, stopped, strict=True):
        ends = [i for i, token in enumerate(tokens) if token in stops]
        assert cut == (tokens[: ends[0]] if ends else tokens)
        assert finished == bool(ends)
    assert stopped[0][0] == [] and stopped[0][2]


def test_a_stop_token_counts_among_the_new_tokens(mistral):
    longer = {tuple(p): mistral.slow_greedy(p, NEW + 1, ())[0] for p in ragged_prompts(30, seed=8)}
    # A prompt whose token number `place` stands nowhere before it: there it will stop.
    in_time = next(p for p, t in longer.items() if t.index(t[NEW - 1]) == NEW - 1)
    too_late = next(p for p, t in longer.items() if t.index(t[NEW]) == NEW)
    stops = (longer[in_time][NEW - 1], longer[too_late][NEW])
    late, early = longer[too_late], longer[in_time]
    assert not set(stops) & {*late[:NEW], *early[: NEW - 1]}
    results = mistral.decode([list(in_time), list(too_late)], stops=stops)
    assert answers(results) == [(early[: NEW - 1], True), (late[:NEW], False)]


def test_stops_as_soon_as_all_rows_are_done(mistral, monkeypatch):
    """Counts the steps at run time."""
    from radonc_jax.decoding import greedy as module

    calls = []
    advance = module.advance

    def counted(*args):
        jax.debug.callback(lambda: calls.append(1))
        return advance(*args)

    monkeypatch.setattr(module, "advance", counted)
    by_length = {len(mistral.slow_greedy(p)[0]): p for p in ragged_prompts(30, seed=12)}
    lengths = sorted(by_length)
    assert lengths[0] < lengths[1] < NEW == lengths[-1]
    for chosen in (lengths[:1], lengths[:2], lengths):
        calls.clear()
        mistral.decode([by_length[length] for length in chosen], batch=16)
        jax.effects_barrier()
        # The first token is the prefill's, and the stop token is one more.
        assert len(calls) == min(chosen[-1], NEW - 1)


def test_compiles_once_per_length_bucket(mistral):
    scheduler = mistral.scheduler(batch=2)  # a size that no other test has compiled
    rng = np.random.default_rng(0)

    def compilations(*lengths, frozen=mistral.frozen):
        prompts = [rng.integers(0, VOCAB, length).tolist() for length in lengths]
        with CountCompilations() as count:
            scheduler(mistral.trainable, frozen, prompts)
        return count.of("decode")

    assert compilations(3, 32, 17) == 1
    assert compilations(1) == 0
    assert compilations(33, 60, 64, 50, 2, 1, 7) == 1
    # New weights of the same shapes are new arguments, not a new program.
    scaled = jax.tree.map(lambda leaf: leaf * 1.5, mistral.frozen)
    assert compilations(30, 40, frozen=scaled) == 0


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


def test_buckets_waste_little():
    sizes = {padded_length(length) for length in range(1, 4097)}
    assert len(sizes) == 8 + 4 * 8
    for length in range(1, 4097):
        padding = padded_length(length) - length
        assert 0 <= padding < max(32, length / 8)


def test_weights_are_arguments_of_the_compiled_program(mistral):
    scheduler = mistral.scheduler(batch=2)
    tokens, lengths = np.zeros((2, 32), np.int32), np.ones(2, np.int32)
    traced = scheduler._decode.trace(mistral.trainable, mistral.frozen, tokens, lengths)
    given = sum(leaf.nbytes for leaf in jax.tree.leaves((mistral.trainable, mistral.frozen)))
    arguments = sum(aval.size * aval.dtype.itemsize for aval in traced.jaxpr.in_avals)
    assert arguments == given + tokens.nbytes + lengths.nbytes
    assert sum(np.asarray(constant).nbytes for constant in traced.jaxpr.consts) < 1000


@pytest.mark.parametrize(
    "mesh_config", [MeshConfig(8, 1, 1), MeshConfig(2, 2, 2)], ids=["data", "all three"]
)
def test_eight_devices_give_the_same_answers(mistral, mesh_config):
    prompts = ragged_prompts(11, seed=10)
    expected = mistral.decode(prompts)
    mesh = make_mesh(mesh_config, devices=jax.devices()[:8])
    scheduler = mistral.scheduler(mesh=mesh, batch=3)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    assert scheduler.batch == -(-3 // shards) * shards
    results = scheduler(*mistral.placed(mesh), prompts)
    assert answers(results) == answers(expected)
    assert_close_logprobs(results, expected)


def test_the_adapter_is_used(mistral):
    adapter = jax.tree.map(lambda leaf: leaf + 0.3, mistral.trainable)
    prompts = ragged_prompts(5, seed=11)
    tuned = mistral.scheduler()(adapter, mistral.frozen, prompts)
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


class LetterTokenizer:
    """One id per letter; as some real ones, it would add a second BOS if it were asked to."""

    bos_token_id, eos_token_id = BOS, EOS

    def encode(self, text, add_special_tokens=True):
        return [BOS] * add_special_tokens + [3 + ord(letter) % 90 for letter in text]

    def decode(self, tokens, skip_special_tokens=False):
        kept = [t for t in tokens if not skip_special_tokens or t > EOS]
        return " " + "".join(chr(48 + token) for token in kept) + "\n"


def test_text_decoder_gives_one_bos_and_strips(mistral):
    tokenizer = LetterTokenizer()
    scheduler = mistral.scheduler()
    decode = text_decoder(scheduler, tokenizer, mistral.trainable, mistral.frozen)
    texts = ["left breast", "prostate"]
    prompts = [[BOS, *tokenizer.encode(text, add_special_tokens=False)] for text in texts]
    expected = scheduler(mistral.trainable, mistral.frozen, prompts)
    generations = decode(texts)
    assert [(g.tokens, g.logprob, g.finished) for g in generations] == expected
    assert [g.text for g in generations] == [
        tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens, _, _ in expected
    ]
