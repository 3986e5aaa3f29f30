"""Records to batches: what is trained, in which order, in which rows."""

from types import SimpleNamespace

import numpy as np
import pytest
from conftest import run_command
from test_parallel import SEVEN_B

from radonc_jax.data import cohort
from radonc_jax.data.batches import (
    BatchConfig,
    Batches,
    Example,
    encode_answer,
    encode_prompt,
    preflight,
    prompt_room,
    share,
    task_examples,
    text_examples,
)
from radonc_jax.decoding.text import TextDecoder
from radonc_jax.models import huggingface
from radonc_jax.tasks import TASKS, Record, select
from radonc_jax.training import meters

BOS, EOS = 1, 2


class WordTokenizer:
    """One id a word, so that lengths are easy to count."""

    bos_token_id, eos_token_id = BOS, EOS

    def __init__(self):
        self.words = {}

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return [3 + self.words.setdefault(word, len(self.words)) for word in text.split()]

    def __call__(self, texts, add_special_tokens):
        return {"input_ids": [self.encode(text, add_special_tokens) for text in texts]}

    def decode(self, ids):
        names = {number + 3: word for word, number in self.words.items()}
        return " ".join(names[i] for i in ids)


def config(**changes):
    values = dict(examples=4, microbatches=1, sequence_length=64, packing=True, over_length="fail")
    return BatchConfig(**(values | changes))


def record(case_id="c1", words=5):
    diagnosis = " ".join(f"word{n}" for n in range(words))
    return Record(case_id, "p1", diagnosis, "Breast, 50 Gy in 25 fractions", "photon", "C50.911")


def random_examples(count, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Example(
            f"case{n}",
            (BOS, *rng.integers(3, 90, rng.integers(2, 25)).tolist()),
            (*rng.integers(3, 90, rng.integers(0, 8)).tolist(), EOS),
        )
        for n in range(count)
    ]


def unpack(batch):
    """Every segment of a batch as (input tokens, {offset in the segment: target})."""
    found = []
    arrays = {name: array.reshape(-1, array.shape[-1]) for name, array in batch.items()}
    for row in range(len(arrays["tokens"])):
        segments = arrays["segment_ids"][row]
        for segment in range(1, segments.max() + 1):
            places = np.flatnonzero(segments == segment)
            tokens = arrays["tokens"][row, places]
            assert (np.diff(places) == 1).all()
            assert (arrays["positions"][row, places] == np.arange(len(places))).all()
            targets = {
                int(index - places[0]): int(target)
                for index, target, weight in zip(
                    arrays["answer_index"][row],
                    arrays["targets"][row],
                    arrays["weights"][row],
                    strict=True,
                )
                if weight and places[0] <= index <= places[-1]
            }
            found.append((tuple(tokens.tolist()), targets))
    return found


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("microbatches", [1, 3])
def test_a_batch_holds_each_example_whole_and_trains_its_answer_only(packing, microbatches):
    examples = random_examples(23)
    batches = Batches(
        examples,
        config(packing=packing, microbatches=microbatches, examples=10),
        epochs=1,
        seed=3,
        row_multiple=2,
    )
    assert batches.steps == 3  # the last, short batch is trained, not dropped
    seen = []
    for step in range(batches.steps):
        batch = batches[step]
        assert batch["tokens"].shape[0] == microbatches
        assert batch["tokens"].shape[1] % 2 == 0
        seen += unpack(batch)
        assert batch["weights"].sum() == sum(len(t) for _, t in unpack(batch))
    expected = []
    for example in examples:
        tokens = example.prompt + example.answer
        first = len(example.prompt) - 1
        targets = {first + n: token for n, token in enumerate(example.answer)}
        expected.append((tokens[:-1], targets))
    assert sorted(seen, key=str) == sorted(expected, key=str)


def test_all_batches_have_one_shape():
    batches = Batches(random_examples(50), config(), epochs=2, seed=0, row_multiple=1)
    assert (
        len({str({k: v.shape for k, v in batches[s].items()}) for s in range(batches.steps)}) == 1
    )


def test_order_is_drawn_anew_each_epoch_and_from_the_seed():
    examples = random_examples(40)

    def order(seed):
        batches = Batches(examples, config(packing=False), epochs=2, seed=seed, row_multiple=1)
        ids = [batches.case_ids(step) for step in range(batches.steps)]
        return sum(ids[:10], []), sum(ids[10:], [])

    first, second = order(1)
    assert sorted(first) == sorted(second) == sorted(e.case_id for e in examples)
    assert first != second
    assert order(1) == (first, second)
    assert order(2)[0] != first


@pytest.mark.parametrize("equal", [True, False])
def test_sharing_out_loses_nothing_and_is_even(equal):
    lengths = np.random.default_rng(0).integers(1, 200, 240).tolist()
    parts = share(lengths, 12, equal=equal)
    assert sorted(sum(parts, [])) == list(range(240))
    totals = [sum(lengths[i] for i in part) for part in parts]
    assert max(totals) - min(totals) <= 2
    if equal:
        assert {len(part) for part in parts} == {20}
    # One long item is a part of its own, and the others share the rest.
    assert share([1, 1, 100, 1, 1], 3)[0] == [2]


def test_a_few_items_among_many_parts_leave_the_others_empty():
    assert sorted(map(len, share([5, 4], 4))) == [0, 0, 1, 1]


@pytest.mark.parametrize("row_multiple", [1, 4])
def test_rows_are_even_and_steps_too(row_multiple):
    """Clinical lengths: of what goes through the model, hardly anything is padding."""
    rng = np.random.default_rng(4)
    sizes = np.clip(rng.lognormal(4.5, 0.3, 64 * 40).astype(int), 30, 400)
    examples = [Example(f"c{n}", (1,) * (size - 3), (5, 6, 7, 2)) for n, size in enumerate(sizes)]
    settings = config(examples=64, sequence_length=2048)
    batches = Batches(examples, settings, epochs=2, seed=0, row_multiple=row_multiple)
    assert batches.rows % row_multiple == 0 and batches.row_length <= 2048
    assert batches.fill >= 0.97
    totals = [batches.useful_tokens(step) for step in range(batches.steps)]
    assert max(totals) <= 1.005 * min(totals)
    assert sorted(sum((batches.case_ids(s) for s in range(40)), [])) == sorted(
        e.case_id for e in examples
    )
    # A step sees the same examples whether they are packed or not.
    padded = Batches(
        examples,
        config(examples=64, packing=False, sequence_length=512),
        epochs=2,
        seed=0,
        row_multiple=row_multiple,
    )
    for step in (0, 39, 40, 79):
        assert set(padded.case_ids(step)) == set(batches.case_ids(step))
        assert padded.useful_tokens(step) == batches.useful_tokens(step)


def test_short_rows_are_preferred_where_attention_is_dear():
    examples = random_examples(60)
    lengths = [
        Batches(
            examples, config(examples=20), epochs=1, seed=0, row_multiple=1, attention_cost=cost
        ).row_length
        for cost in (0.0, 1.0)
    ]
    assert lengths[1] < lengths[0]


def test_prompt_has_one_bos_and_answer_one_eos():
    tokenizer = WordTokenizer()
    (example,), _ = task_examples([record()], [TASKS["icd"]], tokenizer, config())
    assert example.prompt.count(BOS) == 1 and example.prompt[0] == BOS
    assert example.answer.count(EOS) == 1 and example.answer[-1] == EOS
    assert list(example.prompt) == encode_prompt(tokenizer, TASKS["icd"].prompt(record().diagnosis))
    assert list(example.answer) == encode_answer(tokenizer, "C50.911")


def test_too_long_is_an_error_that_names_cases_and_no_text():
    records = [record("short"), record("long-case", words=200)]
    with pytest.raises(ValueError, match="long-case/icd") as error:
        task_examples(records, [TASKS["icd"]], WordTokenizer(), config())
    assert "word1" not in str(error.value)
    assert "over_length" in str(error.value)


def test_trimming_cuts_the_diagnosis_and_neither_instruction_nor_answer():
    tokenizer = WordTokenizer()
    (example,), report = task_examples(
        [record(words=200)], [TASKS["icd"]], tokenizer, config(over_length="trim_diagnosis")
    )
    assert report.trimmed == 1 and report.too_long == 1
    assert example.length == 64  # all room is used
    prefix, _, suffix = TASKS["icd"].prompt_parts("")
    text = tokenizer.decode(example.prompt[1:])
    assert text.startswith(" ".join(prefix.split())) and text.endswith(" ".join(suffix.split()))
    assert "word0 word1 word2" in text and "word199" not in text
    assert list(example.answer) == encode_answer(tokenizer, "C50.911")


def test_decoding_cuts_where_training_did_and_tells_what_is_beyond_it():
    """But for the answer, whose length training knows: there one of two tokens is counted on."""
    tokenizer, task, long = WordTokenizer(), TASKS["icd"], record(words=200)
    batch = config(over_length="trim_diagnosis")
    (example,), _ = task_examples([long], [task], tokenizer, batch)

    limit = prompt_room(batch.sequence_length)

    def prompt(text, over_length, trained=limit, room=1000):
        scheduler = SimpleNamespace(room=room)
        decoder = TextDecoder(scheduler, tokenizer, None, None, over_length, trained=trained)
        whole = decoder.reads_whole(task, text)
        found = decoder.prompt(task, text)
        assert whole == (found.fits and not found.trimmed)
        return found

    cut = prompt(long.diagnosis, "trim_diagnosis")
    assert (cut.trimmed, cut.fits, cut.beyond) == (True, True, False)
    assert len(cut.tokens) == 63 and tuple(cut.tokens) == example.prompt
    for policy in ("fail", "drop"):  # cases that are compared must not drop out
        found = prompt(long.diagnosis, policy)
        assert found.tokens == encode_prompt(tokenizer, task.prompt(long.diagnosis))
        assert (found.trimmed, found.fits, found.beyond) == (False, True, True)
    assert prompt(record().diagnosis, "trim_diagnosis")[1:] == (False, True, False)
    # Where nothing is known of training, or it had not even this instruction, the context counts.
    for trained in (None, 3):
        found = prompt(long.diagnosis, "trim_diagnosis", trained)
        assert len(found.tokens) > 200 and not found.trimmed
        found = prompt(long.diagnosis, "trim_diagnosis", trained, room=100)
        assert len(found.tokens) == 100 and found.trimmed


def test_dropping_is_counted():
    examples, report = task_examples(
        [record("a"), record("b", words=200)],
        [TASKS["icd"]],
        WordTokenizer(),
        config(over_length="drop"),
    )
    assert [e.case_id for e in examples] == ["a/icd"]
    assert (report.kept, report.dropped) == (1, 1)


def test_an_instruction_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="sequence_length=8"):
        task_examples(
            [record(words=200)],
            [TASKS["icd"]],
            WordTokenizer(),
            config(sequence_length=8, over_length="trim_diagnosis"),
        )


def test_plain_text_trains_every_token():
    (example,), _ = text_examples(["a b c"], WordTokenizer(), config())
    assert example.prompt == (BOS,)
    assert len(example.answer) == 4 and example.answer[-1] == EOS


@pytest.mark.parametrize("policy", ["fail", "trim_diagnosis", "drop"])
def test_preflight_foretells_what_training_does(policy):
    records = {
        "train": [record(f"t{n}", words=10 * n) for n in range(1, 8)],
        "test": [record("x", words=200), record("y", words=2)],
    }
    tasks, tokenizer = list(TASKS.values()), WordTokenizer()
    found = preflight(records, tasks, tokenizer, 64, policy)
    for task in tasks:
        facts = found.facts["tasks"][task.name]
        examples = [
            (split, r, encode_prompt(tokenizer, task.prompt(r.diagnosis)),
             encode_answer(tokenizer, task.answer(r)))
            for split, own in records.items() for r in own
        ]  # fmt: skip
        lengths = [len(p) + len(a) - 1 for *_, p, a in examples]
        assert facts["examples"] == 9 and facts["tokens"]["max"] == max(lengths)
        assert facts["tokens"]["median"] == sorted(lengths)[4]
        long = [e for e, length in zip(examples, lengths, strict=True) if length > 64]
        assert facts["too_long"] == {
            "all": len(long),
            "train": sum(split == "train" for split, *_ in long),
            "test": 1,
        }
        every = [r for own in records.values() for r in own]
        if policy == "fail":
            with pytest.raises(ValueError, match=f"{len(long)} of 9 examples are longer"):
                task_examples(every, [task], tokenizer, config())
            assert facts["kept"] == facts["trimmed"] == facts["dropped"] == 0
        else:
            kept, report = task_examples(every, [task], tokenizer, config(over_length=policy))
            counts = (facts["kept"], facts["trimmed"], facts["dropped"])
            assert counts == (report.kept, report.trimmed, report.dropped)
            assert facts["tokens"] == report.percentiles
        cut = {
            case: n
            for case, _, name, _, n in found.too_long
            if name == task.name
        }  # fmt: skip
        assert cut == {r.case_id: len(p) + len(a) - 1 - 64 for _, r, p, a in long}
        assert facts["tokens_cut"]["max"] == max(cut.values())


def test_preflight_knows_the_last_token_that_fits():
    task, tokenizer = TASKS["icd"], WordTokenizer()

    def too_long(words):
        found = preflight({"train": [record(words=words)]}, [task], tokenizer, 64, "fail")
        return found.facts["tasks"]["icd"]["too_long"]["all"]

    (example,), _ = task_examples([record(words=5)], [task], tokenizer, config())
    fits = 5 + 64 - example.length
    assert (too_long(fits), too_long(fits + 1)) == (0, 1)


def test_preflight_tells_what_never_fits_and_prints_no_text():
    records = {"train": [record("a"), record("b", words=300)]}
    found = preflight(records, [TASKS["icd"]], WordTokenizer(), 8, "trim_diagnosis")
    facts = found.facts["tasks"]["icd"]
    assert facts["unfit"] == 2 and facts["kept"] == 0 and facts["tokens_cut"] is None
    assert [row[-1] for row in found.too_long] == [None, None]
    assert "2 of 2 longer than 8" in str(found) and "word" not in str(found)
    with pytest.raises(ValueError, match="over_length"):
        preflight(records, [TASKS["icd"]], WordTokenizer(), 8, "cut")


@pytest.mark.parametrize(
    "change", [{"examples": 0}, {"microbatches": 0}, {"over_length": "cut"}, {"sequence_length": 0}]
)
def test_config_out_of_range_is_an_error(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        config(**change)


@pytest.mark.slow
def test_a_cohort_fills_its_rows(workspace, tmp_path):
    """As `train` batches it for a 7B model on one device, 32 examples a step."""
    folder = tmp_path / "cohort"
    run_command("synthesize", "--cases=9000", "--seed=2", f"--output={tmp_path / 'extract.csv'}")
    run_command("prepare", f"--input={tmp_path / 'extract.csv'}", f"--output={folder}")
    tokenizer = huggingface.load_tokenizer(workspace.model)
    settings = config(examples=32, sequence_length=2048)
    records = cohort.load_records(folder, "train")
    for task in ("icd", "regimen"):
        examples, _ = task_examples(records, select(task), tokenizer, settings)
        batches = Batches(
            examples,
            settings,
            epochs=1,
            seed=0,
            row_multiple=1,
            attention_cost=meters.attention_cost(SEVEN_B),
        )
        assert batches.fill >= 0.97
