"""The blinded review: a page that tells nothing, and ratings scored by the key."""

import csv
import json
import re
import subprocess
import sys

import pytest
from sklearn.metrics import cohen_kappa_score

from radonc_jax.evaluation import review
from radonc_jax.evaluation.run_folder import Run
from radonc_jax.tasks import Record

N = 12


@pytest.fixture
def run():
    records = [
        Record(f"case{i}", f"pat{i // 2}", f"diagnosis {i} <b>&", "REFERENCE", "photon", "C61")
        for i in range(N)
    ]
    predictions = {
        model: {
            "regimen": [
                {
                    "case_id": record.case_id,
                    "patient_id": record.patient_id,
                    "output": f"{text} answer {i} </script>",
                    "reference": "REFERENCE",
                }
                for i, record in enumerate(records)
            ]
        }
        for model, text in (("original", "vague"), ("tuned", "crisp"))
    }
    return Run("run", "test", predictions, {}, {"workdir": "runs/icd/run"}, held_out=records)


@pytest.fixture
def kit(run, tmp_path):
    key = review.build_review(run, "regimen", tmp_path / "review.html", cases=10, seed=1)
    return key, tmp_path


def test_page_is_blind_and_safe(kit):
    key, folder = kit
    page = (folder / "review.html").read_text()
    assert (
        json.loads((folder / "key.json").read_text()) == key == review.read_key(folder / "key.json")
    )
    for secret in ("REFERENCE", "original", "tuned", "case0", "pat0"):
        assert secret not in page, secret
    assert "<b>" not in page and page.count("</script>") == 1
    assert not re.search(r"https?:|src=|<link|@[A-Z]+@", page)
    assert page.count("<article>") == len(key["items"]) == 10
    for item in key["items"]:
        number = re.escape(item["case_id"].removeprefix("case"))
        article = page.split(f"<h2>Case {item['item']} of 10</h2>")[1].split("</article>")[0]
        shown = re.findall(rf"(vague|crisp) answer {number} ", article)
        named = {"vague": "original", "crisp": "tuned"}
        assert [named[word] for word in shown] == [item["A"], item["B"]]
    assert {item["A"] for item in key["items"]} == {"original", "tuned"}


def test_the_draw_is_seeded(run, tmp_path):
    def items(seed, cases=0):
        return review.build_review(run, "regimen", tmp_path / "p.html", cases=cases, seed=seed)

    assert items(1) == items(1)
    assert items(1)["items"] != items(2)["items"]
    assert len(items(1)["items"]) == N


def test_no_diagnoses_or_another_task(run, tmp_path):
    message = "run folder runs/icd/run has no answers of task 'icd'; it has regimen: .* --task"
    with pytest.raises(ValueError, match=message):
        review.build_review(run, "icd", tmp_path / "p.html", cases=5, seed=0)
    bare = Run("run", "test", run.predictions, {}, {"workdir": "runs/bare"})
    with pytest.raises(ValueError, match="folder runs/bare: 12 of 12 cases have no diagnosis"):
        review.build_review(bare, "regimen", tmp_path / "p.html", cases=5, seed=0)
    assert list(tmp_path.iterdir()) == []


def write_ratings(path, key, rate, rater="A"):
    """`rate(item number, model)` gives (correctness, harm, acceptable)."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(review.COLUMNS)
        for item in key["items"]:
            for answer in "AB":
                values = rate(item["item"], item[answer])
                writer.writerow([key["kit"], item["item"], answer, *values, rater])
    return path


def first_rater(item, model):
    if model == "tuned":
        return (4, 0, 1) if item > 2 else (2, 1, 0)
    return (1, 2, 0) if item > 4 else (3, 0, 1)


def second_rater(item, model):
    return (3, 0, 1) if model == "tuned" else (1 + item % 2, 1, 0)


def test_ratings_are_scored_by_the_key(kit):
    key, folder = kit
    raters = {
        name: review.read_ratings(write_ratings(folder / name, key, rate), key)
        for name, rate in (("a.csv", first_rater), ("b.csv", second_rater))
    }
    result = review.score_ratings(raters, key, bootstrap=100)
    models = result["models"]
    assert models["tuned"]["acceptable"]["value"] == pytest.approx((0.8 + 1.0) / 2)
    assert models["original"]["acceptable"]["value"] == pytest.approx((0.4 + 0.0) / 2)
    assert models["tuned"]["correctness"]["value"] == pytest.approx((3.6 + 3.0) / 2)
    assert models["original"]["n"] == 10
    assert models["tuned"]["acceptable"]["low"] < 0.9 <= models["tuned"]["acceptable"]["high"]
    assert result["wilcoxon"]["correctness"]["p_value"] < 0.05
    assert result["wilcoxon"]["harm"]["p_value"] < 0.05  # less harm is better
    order = [(item["item"], model) for item in key["items"] for model in ("tuned", "original")]
    ratings = [[rate(*rated)[0] for rated in order] for rate in (first_rater, second_rater)]
    expected = cohen_kappa_score(*ratings, weights="quadratic", labels=[1, 2, 3, 4])
    (agreement,) = result["kappa"]
    assert agreement["raters"] == ["a.csv", "b.csv"]
    assert agreement["correctness"] == {"n": 20, "kappa": pytest.approx(expected)}
    json.dumps(result, allow_nan=False)


def test_missing_ratings_and_constant_raters_are_defined(kit):
    key, folder = kit

    def partial(item, model):
        return ("", "", "") if item == 3 and model == "tuned" else (4, 0, 1)

    raters = {
        name: review.read_ratings(write_ratings(folder / name, key, partial), key)
        for name in ("a.csv", "b.csv")
    }
    result = review.score_ratings(raters, key, bootstrap=10)
    assert (result["models"]["tuned"]["n"], result["models"]["original"]["n"]) == (9, 10)
    assert result["wilcoxon"]["correctness"]["n"] == 9
    assert result["kappa"][0]["harm"] == {"n": 19, "kappa": None}


def test_a_share_of_acceptable_answers_is_not_called_certain(kit):
    key, folder = kit
    path = write_ratings(folder / "all.csv", key, lambda item, model: (4, 0, 1))
    acceptable = review.score_ratings({"A": review.read_ratings(path, key)}, key, bootstrap=50)[
        "models"
    ]["tuned"]["acceptable"]
    patients = len({item["patient_id"] for item in key["items"]})
    assert acceptable["value"] == acceptable["high"] == 1
    assert acceptable["low"] == pytest.approx(0.025 ** (1 / patients))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("@kit,1,A,", "other,1,A,", "line 2: rated from another page"),
        ("@kit,1,A,", "@kit,99,A,", "line 2: item and answer are none"),
        ("@kit,1,A,", "@kit,1,B,", "line 3: this answer is rated twice"),
        ("@kit,1,A,4", "@kit,1,A,5", "line 2: correctness must be one of 1, 2, 3, 4"),
        ("harm,", "damage,", "no column harm"),
    ],
)
def test_bad_ratings_are_named_by_line(kit, old, new, message):
    key, folder = kit
    path = write_ratings(folder / "a.csv", key, lambda item, model: (4, 0, 1))
    old, new = (text.replace("@kit", key["kit"]) for text in (old, new))
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        review.read_ratings(path, key)


def test_score_command(kit):
    key, folder = kit
    path = write_ratings(folder / "a.csv", key, first_rater)
    command = [sys.executable, "-m", "radonc_jax.review", "--score", f"--output={folder / 'out'}"]
    command += [f"--key={folder / 'key.json'}"]
    done = subprocess.run(
        [*command, f"--ratings={path}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "out" / "review.json").read_text())
    assert result["models"]["tuned"]["acceptable"]["value"] == pytest.approx(0.8)
    assert result["kappa"] == []
    assert "tuned: 80.0 % acceptable" in done.stdout

    done = subprocess.run(
        [*command, f"--ratings={folder / 'gone.csv'}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == f"error: {folder / 'gone.csv'} is missing\n"
