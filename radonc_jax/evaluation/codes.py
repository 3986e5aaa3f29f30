"""ICD-10-CM codes beyond right and wrong: by depth, by kind of error, by rarity."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from radonc_jax.evaluation.statistics import PatientBootstrap, bootstrap_means
from radonc_jax.tasks.icd import differs_in_side_alone, in_table, is_leaf, path

DEPTHS = ("chapter", "block", "category", "full")
ERRORS = ("too_general", "too_specific", "side_only", "other", "not_a_code")
# Cases of the code in the training split.
RARITY = ((0, 0), (1, 5), (6, 20), (21, 100), (101, None))


def rarity_bin(count: int) -> str:
    """The name of the bin of RARITY that `count` falls in: "0", "1-5" ... "101+"."""
    for low, high in RARITY:
        if high is None or count <= high:
            return f"{low}+" if high is None else str(low) if low == high else f"{low}-{high}"
    raise AssertionError(count)


def _agrees(answer: str | None, reference: str, depth: str) -> bool:
    if answer is None:
        return False
    if depth == "full":
        return answer == reference
    level = DEPTHS.index(depth)
    given, right = path(answer), path(reference)
    return len(given) > level and len(right) > level and given[level] == right[level]


def kind_of_error(answer: str | None, reference: str) -> str | None:
    """One of ERRORS, or None where the answer is right.

    "not_a_code" is unparseable or not in the table; "too_general" is a header or code above the
    reference, "too_specific" one below it; "side_only" has the reference's words but for the side.
    """
    if answer == reference:
        return None
    if answer is None or not in_table(answer):
        return "not_a_code"
    if answer in path(reference):
        return "too_general"
    if reference in path(answer):
        return "too_specific"
    return "side_only" if differs_in_side_alone(answer, reference) else "other"


def assess(
    models: Mapping[str, Sequence[dict]],
    training_counts: Counter | None = None,
    *,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict:
    """`details` of task icd: each score {value, low, high} by model.

    Args:
      models: name -> predictions of the same cases in the same order.
      training_counts: cases of each code in the training split, where it is at hand.

    Returns:
      valid_leaf {model: ...}: share of all answers that are codes of the table that can be billed.
      by_depth {depth: {model: ...}}: share that agrees down to chapter, block, category, or wholly.
      hierarchical {precision, recall, f1: {model: ...}}: with A and R the steps from the chapter
      down to answer and reference, each with itself, sum |A and R| / sum |A|, sum |A and R| /
      sum |R| and their harmonic mean (Kiritchenko et al., AI 2006, LNCS 4013:395).
      errors {kind: {model: count}}. by_rarity [{bin, n, patients, model: ...}] or null.
    """
    result: dict = {
        "valid_leaf": {},
        "by_depth": {depth: {} for depth in DEPTHS},
        "hierarchical": {name: {} for name in ("precision", "recall", "f1")},
        "errors": {kind: {} for kind in ERRORS},
        "by_rarity": None,
    }
    bins: dict[str, np.ndarray] = {}
    if training_counts is not None:
        first = next(iter(models.values()))
        references, people = zip(*((p["reference"], p["patient_id"]) for p in first), strict=True)
        named = np.array([rarity_bin(training_counts[code]) for code in references])
        names = [rarity_bin(low) for low, _ in RARITY]
        bins = {name: named == name for name in names if (named == name).any()}
        result["by_rarity"] = [
            {"bin": name, "n": int(chosen.sum()), "patients": len(set(np.array(people)[chosen]))}
            for name, chosen in bins.items()
        ]
    for model, predictions in models.items():
        patients = [p["patient_id"] for p in predictions]
        pairs = [(p["answer"], p["reference"]) for p in predictions]
        columns = {depth: [_agrees(*pair, depth) for pair in pairs] for depth in DEPTHS}
        columns["valid_leaf"] = [answer is not None and is_leaf(answer) for answer, _ in pairs]
        columns |= {f"rarity {name}": columns["full"] for name in bins}
        scores = bootstrap_means(
            columns,
            patients,
            resamples=bootstrap,
            seed=seed,
            shares=tuple(columns),
            within={f"rarity {name}": chosen for name, chosen in bins.items()},
        )
        result["valid_leaf"][model] = scores["valid_leaf"]
        for depth in DEPTHS:
            result["by_depth"][depth][model] = scores[depth]
        for row in result["by_rarity"] or ():
            row[model] = scores[f"rarity {row['bin']}"]
        for name, score in _hierarchical(pairs, patients, bootstrap, seed).items():
            result["hierarchical"][name][model] = score
        errors = Counter(kind_of_error(*pair) for pair in pairs)
        for kind in ERRORS:
            result["errors"][kind][model] = errors[kind]
    return result


def _hierarchical(
    pairs: Sequence[tuple[str | None, str]], patients: Sequence[str], bootstrap: int, seed: int
) -> dict[str, dict]:
    steps = [(set(path(answer) if answer else ()), set(path(right))) for answer, right in pairs]
    counts = np.array([(len(a & r), len(a), len(r)) for a, r in steps], dtype=float)

    def scores(common, answered, right) -> dict[str, np.ndarray]:
        found = {
            "precision": (common, answered),
            "recall": (common, right),
            "f1": (2 * common, answered + right),
        }
        return {
            name: np.divide(n, d, out=np.zeros_like(n), where=d > 0)
            for name, (n, d) in found.items()
        }

    values = {name: float(v[0]) for name, v in scores(*counts.sum(0)[:, None]).items()}
    result = {name: {"value": value, "low": None, "high": None} for name, value in values.items()}
    if bootstrap:
        draw = PatientBootstrap(patients, bootstrap, seed)
        totals = draw.sums(counts)
        samples = np.concatenate([weights @ totals for weights in draw.weights()])
        for name, sampled in scores(*samples.T).items():
            low, high = draw.centred_interval(values[name], sampled, 0, 1)
            result[name] |= {"low": low, "high": high}
    return result
