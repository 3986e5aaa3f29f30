"""The evaluation run: prompts out, generations in, files and metrics by contract."""

import hashlib
import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from radonc_jax.evaluation import baselines, run
from radonc_jax.tasks import TASKS, Record, WithExamples, choose_examples, select

RECORDS = [
    Record("c1", "p1", "cancer of R breast", "40 Gy in 15 fx, R breast", "photon", "C50.911"),
    Record("c2", "p2", "prostate ca", "70 Gy(RBE) in 28 fx, prostate", "proton", "C61"),
    Record("c3", "p2", "ca of L breast", "40 Gy in 15 fx, L breast", "photon", "C50.912"),
]


def generation(text, **fields):
    return SimpleNamespace(
        **{"text": text, "tokens": [], "logprob": -0.5, "finished": True, "gap": 0.25}
        | {"trimmed": False, "label_logprobs": None}
        | fields
    )


def answering(texts, **fields):
    return lambda task, diagnoses: [generation(text, **fields) for text in texts]


def evaluate(decode, output=None, task="icd", records=RECORDS, **options):
    options = {"split": "test", "model": "tuned", "bootstrap": 20} | options
    return run.evaluate(decode, records, select(task), output=output, **options)


def test_files_follow_the_contract(tmp_path):
    seen = []

    def decode(task, diagnoses):
        seen.extend(map(task.prompt, diagnoses))
        texts = [" C50.911\n", "no idea", "C50.911"]
        return [generation(text, finished=text != "no idea") for text in texts]

    result = evaluate(decode, tmp_path / "out", ceiling={"icd": 0.9})
    task = TASKS["icd"]
    assert seen == [task.prompt(record.diagnosis) for record in RECORDS]
    lines = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {
        "case_id": "c1",
        "task": "icd",
        "prompt_sha256": hashlib.sha256(seen[0].encode()).hexdigest(),
        "output": " C50.911\n",
        "answer": "C50.911",
        "reference": "C50.911",
        "correct": True,
        "rouge1": 1.0,
        "logprob": -0.5,
        "finished": True,
        "patient_id": "p1",
        "gap": 0.25,
        "trimmed": False,
    }
    assert [json.loads(line)["correct"] for line in lines] == [True, False, False]
    assert json.loads(lines[1])["answer"] is None
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == result
    keys = """task split model n unparseable unfinished accuracy rouge1 precision_macro recall_macro
    f1_macro precision_weighted recall_weighted f1_weighted per_class confusion ceiling
    rouge1_precision rouge1_recall rouge1_decimal precision_micro recall_micro f1_micro
    unparseable_share unfinished_share patients interval_method predictions_sha256"""
    assert set(result) == set(keys.split())
    written = (tmp_path / "out" / "predictions.jsonl").read_bytes()
    assert result["predictions_sha256"] == hashlib.sha256(written).hexdigest()
    assert (result["n"], result["unparseable"], result["unfinished"]) == (3, 1, 1)
    assert result["ceiling"] == 0.9
    # Nothing is left beside the two files.
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "metrics.json",
        "predictions.jsonl",
    ]
    assert run.read_predictions(tmp_path / "out" / "predictions.jsonl") == {
        "icd": [json.loads(line) for line in lines]
    }


def test_several_tasks(tmp_path):
    result = evaluate(answering(["photon", "C61", "40 Gy in 15 fx, L breast"]), tmp_path, "all")
    assert (result["task"], result["n"], set(result["tasks"])) == ("all", 9, set(TASKS))
    assert run.split_tasks(result) == result["tasks"]
    assert result["tasks"]["regimen"]["accuracy"]["value"] == pytest.approx(1 / 3)
    single = evaluate(answering(["photon", "C61", "x"]), None, "modality")
    assert run.split_tasks(single) == {"modality": single}
    by_task = run.read_predictions(tmp_path / "predictions.jsonl")
    assert {task: len(lines) for task, lines in by_task.items()} == dict.fromkeys(TASKS, 3)


def test_quick_scores_equal_the_full_ones_but_for_the_intervals():
    decode = answering(["C50.911", "C61", "x"])
    full, quick = evaluate(decode), evaluate(decode, bootstrap=0)
    assert quick["accuracy"] == {"value": full["accuracy"]["value"], "low": None, "high": None}
    assert quick["per_class"] == full["per_class"]


def test_bad_decoders_and_records_write_nothing(tmp_path):
    output = tmp_path / "out"
    with pytest.raises(ValueError, match="2 answers to 3 prompts"):
        evaluate(answering(["a", "b"]), output)
    with pytest.raises(ValueError, match="3 of 3 answers have a log-probability that is not"):
        evaluate(answering("abc", logprob=float("nan")), output)
    with pytest.raises(ValueError, match="split 'test' has no cases"):
        evaluate(answering([]), output, records=[])
    with pytest.raises(ValueError, match="1 case ids stand more than once"):
        evaluate(answering("ab"), output, records=[RECORDS[0]] * 2)
    with pytest.raises(ValueError, match="model is 'best'"):
        evaluate(answering("abc"), output, model="best")
    assert not output.exists()


def test_damaged_predictions_are_named_without_their_text(tmp_path):
    path = tmp_path / "predictions.jsonl"
    with pytest.raises(FileNotFoundError, match="predictions.jsonl is missing"):
        run.read_predictions(path)
    for content, message in (
        ('{"output": "secret', "line 1: not a JSON object"),
        ('["secret"]', "line 1: not a JSON object"),
        ('{"case_id": "secret", "task": "icd"}', "line 1: no answer, correct"),
        ("", "holds no predictions"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message) as error:
            run.read_predictions(path)
        assert "secret" not in str(error.value)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    run.write_file(path, "old")

    def fail(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(run.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        run.write_file(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# -- baselines -------------------------------------------------------------------------------


def training(*pairs):
    return [
        Record(f"t{i}", f"q{i}", diagnosis, "8 Gy x 1", "photon", code)
        for i, (diagnosis, code) in enumerate(pairs)
    ]


TRAINING = training(
    ("Prostate  CA", "C61"),
    ("prostate ca", "C61"),
    ("prostate ca", "C20"),
    ("ca of L breast", "C50.912"),
    ("another text", "C20"),
    ("one more", "C20"),
)


def test_majority_and_lookup():
    task = TASKS["icd"]
    assert baselines.majority_answers(task, TRAINING, RECORDS) == ["C20"] * 3
    assert baselines.lookup_answers(task, TRAINING, RECORDS) == ["C20", "C61", "C50.912"]
    # A tie is settled by spelling, not by the order of the rows.
    tied = training(("a", "C61"), ("b", "C20"))
    for rows in (tied, tied[::-1]):
        assert baselines.majority_answers(task, rows, RECORDS[:1]) == ["C20"]
    with pytest.raises(ValueError, match="training split is empty"):
        baselines.majority_answers(task, [], RECORDS)


def test_baselines_are_scored_as_models_are():
    scores = baselines.score_baselines(TASKS["icd"], TRAINING, RECORDS, split="test", bootstrap=20)
    assert scores["majority"]["accuracy"]["value"] == 0
    assert scores["lookup"]["accuracy"]["value"] == pytest.approx(2 / 3)
    assert scores["lookup"]["model"] == "lookup"
    same = evaluate(answering(["C20", "C61", "C50.912"]), seed=0)
    assert scores["lookup"] == same | {"model": "lookup"}


def test_nearest_neighbours_vote_by_likeness():
    rows = training(
        ("squamous cell carcinoma of the larynx", "C32.0"),
        ("squamous cell carcinoma of the larynx, supraglottic", "C32.1"),
        ("adenocarcinoma of the prostate, gleason 7", "C61"),
        ("adenocarcinoma of the prostate, gleason 9", "C61"),
        ("adenocarcinoma of the rectum", "C20"),
    )
    asked = training(("prostate adenocarcinoma gleason 7", ""), ("larynx squamous", ""), ("12", ""))
    answers = baselines.nearest_answers(TASKS["icd"], rows, asked)
    # The last shares no word with any: the majority.
    assert answers == ["C61", "C32.0", "C61"]
    assert baselines.nearest_answers(TASKS["icd"], rows[::-1], asked) == answers


def nearest_answers_slowly(task, rows, asked):
    """All cosines at once, and every row of them sorted whole."""
    rows = sorted(rows, key=lambda record: record.case_id)
    known, others = baselines._features(rows, asked)
    answers = []
    for cosine in np.asarray((others @ known.T).todense()):
        votes = Counter()
        for place in np.argsort(-cosine, kind="stable")[: baselines.NEIGHBOURS]:
            if cosine[place] > 0:
                votes[task.reference(rows[place])] += float(cosine[place])
        best = min(votes, key=lambda answer: (-votes[answer], answer), default=None)
        answers.append(best or baselines.majority_answers(task, rows, asked)[0])
    return answers


@pytest.mark.parametrize("n", [1, 4, 5, 6, 7, 40, 600])
def test_nearest_neighbours_are_those_of_the_whole_order_however_many_tie(n, monkeypatch):
    rng = np.random.default_rng(n)
    words, codes = "breast lung prostate left right stage".split(), "C61 C20 C32.0 C32.1".split()

    def texts(count):
        # Few words make most texts twins of others; some share no word with any.
        return [
            (" ".join(rng.choice(words, rng.integers(1, 4))) if rng.random() < 0.95 else "none", c)
            for c in rng.choice(codes, count)
        ]

    rows, asked = training(*texts(n)), training(*texts(150))
    rows += training(("breast lung", "C61"))  # so that there is a word
    task = TASKS["icd"]
    expected = nearest_answers_slowly(task, rows, asked)
    for cells in (1, 7 * len(rows), 1 << 24):  # a row, some rows, all rows at a time
        monkeypatch.setattr(baselines, "_CELLS", cells)
        assert baselines.nearest_answers(task, rows, asked) == expected
    for _ in range(20):
        cosine = rng.choice(np.float32([0, 0, 0.25, 0.5, 0.75]), n)
        whole = np.argsort(-cosine, kind="stable")[: baselines.NEIGHBOURS]
        assert baselines._nearest(cosine).tolist() == whole[cosine[whole] > 0].tolist()


def test_tfidf_with_logistic_regression_learns_what_a_lookup_cannot():
    rng = np.random.default_rng(0)
    words = {"C61": "prostate gland psa", "C20": "rectum polyp bleeding", "C32.0": "larynx cord"}
    texts = [
        (" ".join(rng.permutation([*text.split(), f"noise{rng.integers(40)}"])), code)
        for code, text in words.items()
        for _ in range(12)
    ]
    rows = training(*texts)
    asked = training(("a bleeding polyp", "C20"), ("psa 7", "C61"), ("cord", "C32.0"))
    task = TASKS["icd"]
    right = [task.reference(record) for record in asked]
    assert baselines.tfidf_answers(task, rows, asked) == right
    assert baselines.tfidf_answers(task, rows[::-1], asked) == right
    assert baselines.lookup_answers(task, rows, asked) != right
    # One class, or texts without a word, leave nothing to learn.
    assert baselines.tfidf_answers(task, rows[:3], asked) == ["C61"] * 3
    assert baselines.tfidf_answers(task, training(("1", "C61"), ("2", "C20")), asked)[0] == "C20"


def test_the_classifier_knows_the_commonest_answers_of_a_large_split(monkeypatch):
    monkeypatch.setattr(baselines, "MOST_ANSWERS", 2)
    rows = training(*[("alpha", "C61")] * 3, *[("beta", "C20")] * 2, ("gamma", "C32.0"))
    asked = training(("gamma", "C32.0"), ("beta", "C20"))
    assert baselines.tfidf_answers(TASKS["icd"], rows, asked)[0] != "C32.0"
    monkeypatch.setattr(baselines, "MOST_TRAINING", 4)
    answers = baselines.tfidf_answers(TASKS["icd"], rows, asked)
    assert answers == baselines.tfidf_answers(TASKS["icd"], rows[::-1], asked)


# -- examples in the prompt ------------------------------------------------------------------


def test_examples_are_shown_before_the_question_and_change_nothing_else():
    task = TASKS["icd"]
    shown = choose_examples(task, TRAINING, 2, seed=1)
    few = WithExamples(task, shown)
    prompt = few.prompt("ca of the lung")
    assert prompt.endswith(task.prompt("ca of the lung"))
    for example in shown:
        assert f"{task.prompt(example.diagnosis)}{task.answer(example)}\n\n" in prompt
    assert few.parse("C61\n\nGive the ICD") == "C61"
    assert (few.name, few.reference(RECORDS[1])) == ("icd", "C61")
    assert "".join(few.prompt_parts("x")) == few.prompt("x")


def test_examples_are_of_different_answers_first_and_seeded():
    task = TASKS["icd"]
    for seed in range(8):
        shown = choose_examples(task, TRAINING, 3, seed)
        assert {task.reference(example) for example in shown} == {"C61", "C20", "C50.912"}
        assert shown == choose_examples(task, TRAINING[::-1], 3, seed)
    assert len({choose_examples(task, TRAINING, 3, seed)[0] for seed in range(8)}) > 1
    assert len(choose_examples(task, TRAINING, 6)) == 6
    with pytest.raises(ValueError, match="between 1 and 6"):
        choose_examples(task, TRAINING, 7)
