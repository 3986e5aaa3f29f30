"""report.json, report.html and the compare command, on run folders written by the evaluation."""

import base64
import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from reports import NASTY, make_cohort, make_run

from radonc_jax.data.cohort import sha256
from radonc_jax.evaluation import findings, report, run, run_folder
from radonc_jax.tasks import TASKS


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return make_cohort(tmp_path_factory.mktemp("data") / "cohort")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, cohort):
    return make_run(tmp_path_factory.mktemp("runs") / "all", cohort, "all")


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.open, self.events = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.events += [name for name, _ in attrs if name.startswith("on")]
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href", "action")]
        if tag not in ("meta", "br", "input", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href", "action")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_of_one_run(workdir):
    result = report.write_report(workdir, "test", bootstrap=50)
    assert json.loads((workdir / "report.json").read_text()) == result
    assert list(result["tasks"]) == list(TASKS)
    for task, entry in result["tasks"].items():
        folder = workdir / "evaluation" / "test"
        for model in run.MODELS:
            written = json.loads((folder / model / "metrics.json").read_text())
            assert entry[model] == written["tasks"][task]
        assert {"wilcoxon", "mcnemar", "difference", "f1_macro", "effect"} <= set(entry["tests"])
        value = entry["tuned"]["accuracy"]["value"] - entry["original"]["accuracy"]["value"]
        assert entry["tests"]["difference"]["value"] == pytest.approx(value)
        assert entry["tests"]["wilcoxon"]["p_holm"] >= entry["tests"]["wilcoxon"]["p_value"]
        assert set(entry["baselines"]) == {"majority", "lookup", "nearest", "tfidf"}
        assert entry["baselines"]["majority"]["n"] == entry["tuned"]["n"] == 48
        assert entry["further_runs"] == []
        assert entry["sizes"] == {"train": 30, "validation": 6, "test": 48}
    assert result["tasks"]["icd"]["ceiling"] == 0.93
    assert result["tasks"]["regimen"]["ceiling"] is None
    assert result["provenance"]["all"]["manifest"] == {"seed": 5}


def test_page_is_self_contained_and_escapes(workdir):
    report.write_report(workdir, "test", bootstrap=50)
    text = (workdir / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert not [link for link in page.links if not link.startswith("#")]
    assert not re.search(r"url\((?!#)", text)
    assert page.events == []
    # Data and one script, and that one alone may run: the policy has its hash.
    assert page.tags.count("script") == 2
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}';" in text
    assert NASTY not in text and "\\u003cscript\\u003e" in text
    assert "<i>" not in text  # a site of the cohort
    assert findings.NOTICE in text
    shown = text[: text.index('<script type="application/json"')]
    shown = re.sub(r"<[^>]*>", " ", shown[shown.index("</style>") :])
    assert not re.search(r"\b(nan|None|inf)\b", shown)
    assert "var(--tuned)" in text and "width=device-width" in text
    assert "prefers-color-scheme: dark" in text
    # The very figures of report.json stand in the table.
    accuracy = json.loads((workdir / "report.json").read_text())["tasks"]["icd"]["tuned"][
        "accuracy"
    ]
    assert f"<td>{accuracy['value']:.3f}<small>{accuracy['low']:.3f}" in text


def test_a_published_report_holds_no_clinical_text(workdir, tmp_path):
    runs = [run_folder.read_run(workdir)]
    report.write_runs(runs, tmp_path, include_text=False, figures=True, bootstrap=20)
    assert len(list(tmp_path.iterdir())) == 4
    for path in tmp_path.iterdir():
        text = path.read_text("utf-8", "ignore")
        for clinical in ("L breast", "alert", "variant 1", "test-1", "50 Gy in 25"):
            assert clinical not in text, (path.name, clinical)
    page = Page((tmp_path / "report.html").read_text())
    assert "script" not in page.tags


def test_a_published_report_tells_no_folder_and_no_command_line(tmp_path, cohort):
    private = "/home/j.doe/weights/base-7b"
    folder = make_run(tmp_path / "one", cohort, name=private)
    manifest = {
        "base": {"model": private, "folder": private, "sha256": {"model.safetensors": "a7ca"}},
        "init_from": {"folder": "../j.doe/adapter", "step": 3},
        "cohort": {"folder": str(cohort), "manifest_sha256": sha256(cohort / "manifest.json")},
        "environment": {
            "versions": {"jax": "0.10.2"},
            "command": ["--config=/home/j.doe/a.py"],
            "xla_flags": "--xla_dump_to=/home/j.doe",
        },
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    runs = [run_folder.read_run(folder)]
    private_report = report.write_runs(runs, tmp_path / "own", bootstrap=20)
    assert private_report["provenance"]["one"]["manifest"] == manifest
    assert private in (tmp_path / "own" / "report.html").read_text()
    public = report.write_runs(runs, tmp_path / "public", include_text=False, bootstrap=20)
    kept = public["provenance"]["one"]
    assert kept["model"] == public["tasks"]["icd"]["model"] == "base-7b"
    assert kept["manifest"] == {
        "base": {"model": "base-7b", "sha256": {"model.safetensors": "a7ca"}},
        "init_from": {"step": 3},
        "cohort": {"manifest_sha256": manifest["cohort"]["manifest_sha256"]},
        "environment": {"versions": {"jax": "0.10.2"}},
    }
    for name in ("report.html", "report.json"):
        text = (tmp_path / "public" / name).read_text()
        assert "base-7b" in text and "j.doe" not in text and str(tmp_path) not in text, name


def test_same_input_same_bytes(workdir, tmp_path):
    for name in ("a", "b"):
        runs = [run_folder.read_run(workdir)]
        report.write_runs(runs, tmp_path / name, figures=True, bootstrap=20)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["figure.png", "figure.svg", "report.html", "report.json"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_a_baseline_that_wins_is_said_plainly(tmp_path, cohort):
    folder = make_run(tmp_path / "poor", cohort, right=(0.0, 0.05))
    result = report.write_report(folder, "test", bootstrap=20)
    assert result["tasks"]["icd"]["baselines"]["majority"]["accuracy"]["value"] > 0.3
    assert (
        "a simple baseline does better than the tuned model on the ICD-10-CM code"
        in (folder / "report.html").read_text()
    )


def test_a_run_without_its_cohort_is_reported_without_baselines(tmp_path, cohort):
    folder = make_run(tmp_path / "moved", cohort)
    (folder / "config.json").write_text(json.dumps({"cohort": str(tmp_path / "gone")}))
    entry = report.write_report(folder, "test", bootstrap=20)["tasks"]["icd"]
    assert entry["baselines"] is None and entry["sizes"] is None and entry["ceiling"] is None
    with pytest.raises(FileNotFoundError, match="no such cohort folder"):
        run_folder.read_run(folder, cohort=tmp_path / "gone")


def test_a_cohort_prepared_anew_is_refused(tmp_path, cohort):
    folder = make_run(tmp_path / "run", cohort)
    path = folder / "evaluation" / "test"
    for model in run.MODELS:
        file = path / model / "predictions.jsonl"
        file.write_text(file.read_text().replace('"reference": "C61"', '"reference": "C62.10"'))
        scores = json.loads((path / model / "metrics.json").read_text())
        scores["predictions_sha256"] = sha256(file)
        (path / model / "metrics.json").write_text(json.dumps(scores))
    with pytest.raises(ValueError, match="16 references of task icd differ"):
        report.write_report(folder, "test", bootstrap=20)
    assert not (folder / "report.json").exists()


def compare(*flags):
    return subprocess.run(
        [sys.executable, "-m", "radonc_jax.compare", *flags],
        capture_output=True,
        text=True,
        check=False,
    )


def test_compare_command(tmp_path, cohort):
    first = make_run(tmp_path / "one" / "icd", cohort, name="mistral")
    second = make_run(tmp_path / "two" / "icd", cohort, right=(0.1, 0.6), name="llama2")
    third = make_run(tmp_path / "modality", cohort, "modality")
    done = compare(f"--runs={first},{second},{third}", f"--output={tmp_path / 'report'}")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "report" / "report.json").read_text())
    assert result["runs"] == ["icd", "icd (2)", "modality"]
    assert list(result["tasks"]) == ["modality", "icd"]
    icd = result["tasks"]["icd"]
    assert (icd["model"], icd["further_runs"][0]["model"]) == ("mistral", "llama2")
    assert icd["further_runs"][0]["run"] == "icd (2)"
    values = [e["tests"]["wilcoxon"]["p_value"] for e in (icd, icd["further_runs"][0])]
    values.append(result["tasks"]["modality"]["tests"]["wilcoxon"]["p_value"])
    assert min(values) * 3 == pytest.approx(
        min(e["tests"]["wilcoxon"]["p_holm"] for e in (icd, icd["further_runs"][0]))
    )
    lines = done.stdout.splitlines()
    scores = [icd[model]["accuracy"]["value"] for model in ("original", "tuned")]
    told = "icd: accuracy {:.3f} original, {:.3f} tuned, n 48, ".format(*scores)
    told += "one-sided Wilcoxon by patient p = "  # of whom each has two cases
    assert [line.startswith(told) for line in lines] == [False, True, False, False]
    assert lines[2].startswith("icd: icd (2) tuned against icd tuned: ")
    assert lines[3] == f"report: {tmp_path / 'report' / 'report.html'}"
    assert (tmp_path / "report" / "figure.png").read_bytes()[:4] == b"\x89PNG"

    steps = [f"reading {folder}, split test" for folder in (first, second, third)]
    steps += ["scores, intervals, tests and baselines of 3 run(s)"]
    assert done.stderr.splitlines() == [*steps, "drawing figures, making the page"]

    # A run without one of the two models: one clear line, nothing written.
    (third / "evaluation" / "test" / "original" / "predictions.jsonl").unlink()
    done = compare(f"--runs={first},{third}", f"--output={tmp_path / 'report'}")
    assert done.returncode == 1
    replaced, *steps, error = done.stderr.splitlines()
    page = tmp_path / "report" / "report.html"
    assert replaced == (
        f"{page.parent} has a report already, which is replaced once the new one is made"
    )
    assert steps == [f"reading {folder}, split test" for folder in (first, third)]
    assert error.startswith("error: ")
    assert "no predictions of the original model on split 'test'" in error
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == result
    # Only splits that `evaluate` takes are taken, so that no hint names another.
    done = compare(f"--runs={first}", "--split=valid", f"--output={tmp_path / 'none'}")
    assert done.returncode == 1
    assert "--split=valid: value should be one of <train|validation|test>" in done.stderr
    assert not (tmp_path / "none").exists()


def test_what_evaluate_would_refuse_is_not_advised(tmp_path, cohort):
    """A run on plain text, which has no questions; and a folder that is no run's."""
    (tmp_path / "config.json").write_text(json.dumps({"cohort": str(cohort), "task": "text"}))
    with pytest.raises(ValueError, match="plain text .* it cannot be compared; leave it out"):
        run_folder.read_run(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="is no run folder: it has no config.json"):
        run_folder.read_run(tmp_path)
