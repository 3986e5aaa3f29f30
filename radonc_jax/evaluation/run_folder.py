"""Run folders read: what the models answered, of one checkpoint, and the cohort they were asked on.

What does not belong together is refused, and what is of another checkpoint is left out and told.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from radonc_jax.data.cohort import (
    as_records,
    is_finished_cohort,
    is_of_run,
    load_manifest,
    load_split,
    of_run,
    sha256,
)
from radonc_jax.data.splits import SPLITS
from radonc_jax.evaluation import robustness
from radonc_jax.evaluation.metrics import judge_again
from radonc_jax.evaluation.run import (
    CONSTRAINED,
    METRICS,
    MODELS,
    PREDICTIONS,
    PREDICTIONS_SHA256,
    SOURCE,
    VARIANTS,
    is_number,
    read_predictions,
    split_tasks,
)
from radonc_jax.tasks import TASKS, Record


@dataclass(frozen=True)
class Run:
    """One run folder's evaluation of both models on one split.

    `predictions` and `metrics` are by model, then by task; beside "original" and "tuned" they hold
    the variants that the folder has. `validation` are the predictions of the validation split, of
    the models that answered it; `robustness` what robustness.json of a model holds. What lies there
    from another checkpoint, base or cohort than the model's answers to `split`, and validation
    answers that were asked for with other settings, are in `left_out`. `ceiling` is known of the
    test split alone. The metrics of the models in `unproven` do not name their predictions, as
    older versions left them: another model's could lie there.
    """

    name: str
    split: str
    predictions: dict[str, dict[str, list[dict]]]
    metrics: dict[str, dict[str, dict]]
    provenance: dict
    ceiling: dict[str, float] = field(default_factory=dict)
    training: Sequence[Record] = ()  # empty where the cohort is not at hand
    held_out: Sequence[Record] = ()
    sizes: dict[str, int] | None = None  # cases by split
    config: dict = field(default_factory=dict)  # the run's config.json
    cohort: dict = field(default_factory=dict)  # the cohort's manifest.json
    cases: pd.DataFrame | None = None  # cohort rows of the split: site, sex, age ... where known
    validation: dict[str, dict[str, list[dict]]] = field(default_factory=dict)
    robustness: dict[str, dict] = field(default_factory=dict)
    left_out: Sequence[str] = ()  # a line each
    unproven: Sequence[str] = ()  # models
    # Model (or "validation/" and model) and task -> answers that an earlier version of the code
    # read or judged otherwise than `predictions` and `validation` have them.
    judged_anew: dict[str, dict[str, int]] = field(default_factory=dict)


def _read_json(path: Path, writer: str = "evaluate", advice: str = "evaluate again") -> dict:
    """What the file holds, {} where it is missing.

    Raises:
      ValueError: it is no JSON object, or a number in it is not finite: figures are taken from it
        as they stand, and no report could be written of such a one.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}: not valid JSON, so not what {writer} writes; {advice}"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds no JSON object; {advice}")
    odd = _not_finite(content)
    if odd is not None:
        raise ValueError(f"{path}: not what {writer} writes, {odd} is no finite number; {advice}")
    return content


def _not_finite(content: object) -> str | None:
    """The place of the first number that is not finite ("icd.f1_macro.value"), else None."""
    if isinstance(content, float):
        return None if math.isfinite(content) else ""
    inner = content.items() if isinstance(content, dict) else ()
    inner = enumerate(content) if isinstance(content, list) else inner
    for key, value in inner:
        place = _not_finite(value)
        if place is not None:
            return f"{key}.{place}" if place else str(key)
    return None


def read_run(workdir: Path, split: str = "test", cohort: Path | None = None) -> Run:
    """Reads a run folder that holds the evaluations of both models on `split`.

    The cohort (its place is `cohort`, else the one in the run's config.json) adds baselines, the
    ceiling, subgroups and the split sizes. A run folder that has travelled without its cohort is
    read all the same, unless `cohort` was given and is not there. A cohort whose manifest is not
    the one that the run's manifest names is not the run's, and is not read.

    Raises:
      FileNotFoundError: the folder, or the predictions or metrics of a model, are missing.
      ValueError: the run was trained on plain text, a file cannot be read, holds predictions of
        another split, task or case than it should or not of all cases (the validation split's too),
        the two models answered different tasks, or `cohort` is not the run's.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise FileNotFoundError(f"{workdir} is no run folder")
    put_back = "train", "put the run's own back"
    config = _read_json(workdir / "config.json", *put_back)
    if config.get("task") == "text":
        raise ValueError(
            f'{workdir} was trained on plain text (task="text"): it has no questions to answer, so '
            "it cannot be compared; leave it out"
        )
    predictions, metrics, provenance, answers = {}, {}, {}, {}
    left_out: list[str] = []
    unproven: list[str] = []
    judged_anew: dict[str, dict[str, int]] = {}
    for model in VARIANTS:
        folder = workdir / "evaluation" / split / model
        if not (folder / PREDICTIONS).is_file() or not (folder / METRICS).is_file():
            if model not in MODELS:
                continue
            if not config:
                raise FileNotFoundError(f"{workdir} is no run folder: it has no config.json")
            raise FileNotFoundError(
                f"{workdir}: no predictions of the {model} model on split {split!r}; run "
                f"python -m radonc_jax.evaluate --workdir={workdir} --split={split} --model={model}"
            )
        if not _is_of_same_model(workdir, split, folder, left_out):
            continue
        answers[model] = _read_settings(folder)
        closed = answers[model].get("constraints")
        first = answers.get("original" + CONSTRAINED, {}).get("constraints", closed)
        if closed not in (None, first):
            del answers[model]
            left_out.append(
                f"{split}/{model}: from another closed set than {split}/original{CONSTRAINED}; "
                "evaluate both with the same --constrained"
            )
            continue
        found = read_evaluation(folder, split, model)
        predictions[model], metrics[model] = found.predictions, found.metrics
        if not found.proven:
            unproven.append(model)
        if found.judged_anew:
            judged_anew[model] = found.judged_anew
        provenance[f"{model}_{PREDICTIONS_SHA256}"] = found.sha256
    if predictions["original"].keys() != predictions["tuned"].keys():
        raise ValueError(
            f"{workdir}: original answered {', '.join(predictions['original'])} and tuned "
            f"{', '.join(predictions['tuned'])}; evaluate both on the same tasks"
        )
    unknown = predictions["tuned"].keys() - TASKS.keys()
    if unknown:
        raise ValueError(f"{workdir}: unknown task {', '.join(sorted(unknown))}")

    manifest = _read_json(workdir / "manifest.json", *put_back)
    provenance |= {"workdir": str(workdir), "model": config.get("model"), "manifest": manifest}
    provenance["answers"] = answers
    training = held_out = ()
    sizes, facts, cases = None, {}, None
    folder = cohort or (config.get("cohort") and of_run(config["cohort"], workdir))
    at_hand = folder and is_finished_cohort(Path(folder))
    if at_hand and not is_of_run(folder, workdir):
        if cohort is not None:
            raise ValueError(
                f"{folder} is not the cohort of {workdir}: its manifest.json is another than the "
                "run's manifest names; give the cohort that the run was made from"
            )
        at_hand = False
    if at_hand or cohort is not None:
        splits = {name: load_split(folder, name, for_run=True) for name in SPLITS}
        sizes = {name: len(rows) for name, rows in splits.items()}
        cases = splits[split]
        _check_cases(workdir, split, predictions["original"], cases["case_id"].astype(str))
        training, held_out = as_records(splits["train"]), as_records(cases)
        facts = load_manifest(folder)
    validation = _read_validation(workdir, split, predictions, judged_anew, left_out)
    for given in validation.values() if sizes is not None else ():
        _check_cases(workdir, "validation", given, splits["validation"]["case_id"].astype(str))
    return Run(
        name=workdir.resolve().name,
        split=split,
        predictions=predictions,
        metrics=metrics,
        provenance=provenance,
        ceiling=(facts.get("ceiling") or {}) if split == "test" else {},
        training=training,
        held_out=held_out,
        sizes=sizes,
        config=config,
        cohort=facts,
        cases=cases,
        validation=validation,
        robustness=_read_robustness(workdir, split, provenance, judged_anew, left_out),
        judged_anew=judged_anew,
        left_out=tuple(left_out),
        unproven=tuple(unproven),
    )


def _check_cases(
    workdir: Path, split: str, predictions: Mapping[str, Sequence[dict]], cases: Sequence[str]
) -> None:
    """ValueError unless every case of the split was answered, and no other: what both models lack
    no comparison of them would show, nor would conformal sets what their calibration lacks."""
    for task, given in predictions.items():
        answered, asked = {prediction["case_id"] for prediction in given}, set(cases)
        if answered != asked:
            raise ValueError(
                f"{workdir}: task {task} has no answer to {len(asked - answered)} of the "
                f"{len(asked)} cases of split {split!r} of its cohort, and {len(answered - asked)} "
                "answers to other cases; evaluate this split again, every model that answered it"
            )


def _is_of_same_model(workdir: Path, split: str, folder: Path, left_out: list[str]) -> bool:
    """Whether answers come from the weights and cohort of their model's free answers to `split`.

    If not, a line is added to `left_out`: training that went on, or evaluate --step, changes the
    folder of one kind of answers, and the others stay as they were.
    """
    model = next(name for name in MODELS if folder.name.startswith(name))

    def origin(path: Path) -> tuple:
        source = _read_json(path / SOURCE)
        cohort = (source.get("cohort") or {}).get("manifest_sha256")
        trained, base = source.get("trained_fingerprint"), source.get("base_fingerprint")
        if model == "original":
            # `train` runs it with an adapter that does nothing, `evaluate` without any: then all of
            # its weights are what could be trained.
            return base or trained, cohort
        return trained, base, cohort

    if origin(folder) == origin(workdir / "evaluation" / split / model):
        return True
    left_out.append(
        f"{folder.parent.name}/{folder.name}: not of the same checkpoint, base and cohort as "
        f"{split}/{model}; evaluate it again"
    )
    return False


# What answers depend on beside weights and prompts, by their names in source.json.
_FLAGS = ("examples", "constraints")  # those that `evaluate` is given
_SETTINGS = (*_FLAGS, "max_new_tokens", "over_length", "precision")


def _read_settings(folder: Path) -> dict:
    """What a folder's source.json tells of the way its answers were asked for: step, seed,
    _SETTINGS and "constrained", the word for the closed set; {} of a folder without one."""
    source = _read_json(folder / SOURCE)
    source |= {"precision": (source.get("answers") or {}).get("precision")}
    names = ("step", "seed", "constrained", *_SETTINGS)
    return {name: source[name] for name in names if source.get(name) is not None}


def _evaluate_command(split: str, model: str, settings: Mapping) -> str:
    plain = next(name for name in MODELS if model.startswith(name))
    flags = [f"--split={split}", f"--model={plain}"]
    if settings.get("examples"):
        flags.append(f"--examples={settings['examples']}")
    if settings.get("constraints"):
        flags.append(f"--constrained={settings.get('constrained', 'table')}")
    return f"python -m radonc_jax.evaluate {' '.join(flags)}"


def _is_asked_alike(workdir: Path, split: str, folder: Path, left_out: list[str]) -> bool:
    """Whether the validation answers in `folder` were asked for as those to `split`: else they are
    those of another predictor, whose errors calibrate nothing. If not, a line is added to
    `left_out`."""
    model = folder.name
    here, there = _read_settings(folder), _read_settings(workdir / "evaluation" / split / model)
    names = list(_SETTINGS)
    if here.get("examples") == there.get("examples") is not None:
        names.append("seed")  # which draws the examples
    differing = [name for name in names if here.get(name) != there.get(name)]
    if not differing:
        return True

    def told(settings: Mapping, name: str) -> str:
        if name == "constraints":  # in words, for it holds hashes
            return settings.get("constrained", "not named") if name in settings else "none"
        return str(settings.get(name, "not stated"))

    listed = ", ".join(
        f"{name} ({told(here, name)}, there {told(there, name)})" for name in differing
    )
    runs = [_evaluate_command("validation", model, there)]
    same_word = there.get("constrained") in (None, here.get("constrained"))
    if set(differing) - set(_FLAGS) or ("constraints" in differing and same_word):
        # No flag of one evaluation mends what the config or the code table has changed.
        runs.append(_evaluate_command(split, model, there))
    left_out.append(
        f"validation/{model}: asked for in another way than {split}/{model}: {listed}; run "
        f"{' and '.join(runs)}{', so that both are asked alike' if len(runs) > 1 else ''}"
    )
    return False


def _read_robustness(
    workdir: Path, split: str, provenance: Mapping, judged_anew: Mapping, left_out: list[str]
) -> dict[str, dict]:
    """robustness.json by model, where it was measured against the answers that lie there now, read
    as they are read now."""
    kept = {}
    for model in MODELS:
        name = f"{split}/{model}/{robustness.ROBUSTNESS}"
        found = _read_json(workdir / "evaluation" / name, advice="evaluate --robustness again")
        if not found:
            continue
        if found.pop(PREDICTIONS_SHA256, None) != provenance[f"{model}_predictions_sha256"]:
            left_out.append(
                f"{name}: measured against other answers than those there now; evaluate "
                "--robustness again"
            )
            continue
        for task, rates in found.items():  # an older version asked some tasks more
            found[task] = {name: rates[name] for name in robustness.asked_of(task) if name in rates}
        for task in sorted(found.keys() & judged_anew.get(model, {}).keys()):
            del found[task]
            left_out.append(
                f"{name}: of task {task}, measured by a version of the code that read or judged "
                "answers otherwise; evaluate --robustness again"
            )
        kept[model] = found
    return kept


@dataclass(frozen=True)
class Evaluation:
    """One folder of answers: `predictions` and `metrics` by task, `sha256` of predictions.jsonl.

    The predictions are read and judged as this version of the code does it; `judged_anew` tells, by
    task, how many of them stand otherwise in the file, and so do the metrics of these tasks. They
    are `proven` where they name these predictions by their hash; else they may be another model's
    with as many right answers, and are to be made anew.
    """

    predictions: dict[str, list[dict]]
    metrics: dict[str, dict]
    sha256: str
    judged_anew: dict[str, int]
    proven: bool


def read_evaluation(folder: Path, split: str, model: str) -> Evaluation:
    """Predictions and metrics of one model by task, held against each other.

    Args:
      model: one of VARIANTS, that answered.

    Raises:
      FileNotFoundError, ValueError: as `read_run`, of this one folder.
    """
    predictions = read_predictions(folder / PREDICTIONS)
    content = _read_json(folder / METRICS)
    try:
        metrics = split_tasks(content)
        models = sorted({str(entry["model"]) for entry in metrics.values()})
        told = {
            task: (entry["split"], entry["n"], entry["unparseable"], entry["accuracy"]["value"])
            for task, entry in metrics.items()
        }
        if not all(is_number(figure) for figures in told.values() for figure in figures[1:]):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{folder / METRICS}: not what evaluate writes; evaluate again") from None
    if predictions.keys() != metrics.keys():
        raise ValueError(f"{folder}: {PREDICTIONS} and {METRICS} hold different tasks")
    for task, (of_split, n, unparseable, accuracy) in told.items():
        if of_split != split:
            raise ValueError(
                f"{folder / METRICS}: is of split {of_split!r}, not {split!r}; evaluate this split "
                "again"
            )
        given = predictions[task]
        if len({prediction["case_id"] for prediction in given}) < len(given):
            twice = len(given) - len({prediction["case_id"] for prediction in given})
            raise ValueError(
                f"{folder / PREDICTIONS}: {twice} case ids of task {task} stand more than once; "
                "evaluate again"
            )
        if len(given) != n:
            raise ValueError(
                f"{folder}: {PREDICTIONS} holds {len(given)} cases of task {task}, {METRICS} "
                f"{n}; rows are missing, so evaluate again"
            )
        # Scores are shown from the one file and tested from the other: both must be of one model.
        right = sum(prediction["correct"] for prediction in given) / n
        unread = sum(prediction["answer"] is None for prediction in given)
        if unread != unparseable or abs(right - accuracy) > 1e-9:
            raise ValueError(
                f"{folder}: {METRICS} is not of the answers in {PREDICTIONS} (task {task}: "
                f"accuracy {accuracy:.4f} and {right:.4f}, {unparseable} and {unread} "
                "unparseable); evaluate again"
            )
    digest = sha256(folder / PREDICTIONS)
    proven = PREDICTIONS_SHA256 in content  # older ones name none
    if proven and content[PREDICTIONS_SHA256] != digest:
        raise ValueError(
            f"{folder}: {METRICS} is not of the answers in {PREDICTIONS}: the SHA-256 that it "
            "names is another; evaluate again"
        )
    if models != [model]:
        raise ValueError(
            f"{folder / METRICS}: is of model {', '.join(models)}, not of {model}; evaluate again"
        )
    judged_anew = {}
    for task in predictions.keys() & TASKS.keys():
        predictions[task], changed = judge_again(predictions[task], TASKS[task])
        if changed:
            judged_anew[task] = changed
    return Evaluation(predictions, metrics, digest, judged_anew, proven)


def _read_validation(
    workdir: Path,
    split: str,
    predictions: Mapping[str, Mapping],
    judged_anew: dict[str, dict[str, int]],
    left_out: list[str],
) -> dict[str, dict[str, list[dict]]]:
    """Predictions of the validation split by the models that answered it and `split`."""
    folder = workdir / "evaluation" / "validation"
    if split == "validation":  # would be calibrated on itself
        return {}
    found = {
        model: read_evaluation(folder / model, "validation", model)
        for model in predictions
        if (folder / model / PREDICTIONS).is_file()
        and (folder / model / METRICS).is_file()
        and _is_of_same_model(workdir, split, folder / model, left_out)
        and _is_asked_alike(workdir, split, folder / model, left_out)
    }
    judged_anew |= {
        f"validation/{model}": given.judged_anew
        for model, given in found.items()
        if given.judged_anew
    }
    return {model: given.predictions for model, given in found.items()}
