"""What was found, in three plain sentences, the bad news included."""

from collections.abc import Mapping

NAMES = {
    "majority": "the majority class",
    "lookup": "a dictionary lookup",
    "nearest": "nearest neighbours",
    "tfidf": "TF-IDF with logistic regression",
}
# What the original model can be given without any tuning.
UNTUNED = {
    "original_examples": "with examples in its prompt",
    "original_constrained": "held to closed sets of answers",
}


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _p(p: float) -> str:
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.4f}"


def _range(score: Mapping, scale: float = 100) -> str:
    if score["low"] is None:
        return ""
    return f", 95 % interval {scale * score['low']:.1f} to {scale * score['high']:.1f}"


def standing(tests: Mapping) -> str:
    """How the tuned model stands to another by `compare_models`: "better" or "worse" where the
    paired 95 % interval of the difference in accuracy lies on one side of 0 and a two-sided test
    agrees at 5 % (see `two_sided_p`), else "unclear" (which includes tests without intervals).

    Both, because where few cases differ the bootstrap is too sure: of 120 cases four that only the
    tuned model gets right give an interval above 0, and an exact p of 0.125.
    """
    low, high = tests["difference"]["low"], tests["difference"]["high"]
    if low is None or two_sided_p(tests) > 0.05:
        return "unclear"
    return "better" if low > 0 else "worse" if high < 0 else "unclear"


def none_right(*models: Mapping) -> bool:
    """Whether not one answer of these metrics is right, so that there is nothing to weigh."""
    return not any(metrics["accuracy"]["value"] for metrics in models)


def several_each(tests: Mapping) -> bool:
    """Whether there are fewer patients than cases, so that tests by case find too much."""
    return tests["wilcoxon_by_patient"]["n"] < tests["wilcoxon"]["n"]


def main_test(tests: Mapping) -> Mapping:
    """The test that a verdict rests on: the one-sided Wilcoxon of right or wrong by patient. Where
    each patient has one case it is that by case, and so is Holm's family."""
    return tests["wilcoxon_by_patient"]


def main_name(tests: Mapping) -> str:
    """What `main_test` is called in a sentence."""
    return "Wilcoxon by patient" if several_each(tests) else "Wilcoxon"


def two_sided_p(tests: Mapping) -> float:
    """p of McNemar's exact test; where patients have several cases, of the Wilcoxon by patient."""
    if several_each(tests):
        return tests["wilcoxon_by_patient"]["p_two_sided"]
    return tests["mcnemar"]["p_value"]


def adjusted_p(tests: Mapping) -> float:
    """p of `main_test`, after Holm where `build_report` has adjusted it."""
    return main_test(tests).get("p_holm", main_test(tests)["p_value"])


def doubts(tests: Mapping) -> list[str]:
    """What keeps `standing` from "better" where the main test finds a gain, in words."""
    found, p = [], two_sided_p(tests)
    if p > 0.05:
        name = (
            "the same test of two sides"
            if several_each(tests)
            else "McNemar's exact two-sided test"
        )
        found.append(f"{name} does not ({_p(p)})")
    low = tests["difference"]["low"]
    if low is not None and low <= 0:
        found.append("the interval of the difference holds 0")
    return found


def judge_tuning(task: str, entry: Mapping) -> dict:
    """The `verdict` of one entry of report.json.

    best_baseline: the baseline that the tuned model stands worst to (see `standing`), of several
      the most accurate; null without baselines.
    tuned_beats_baseline: whether the tuned model is better than every baseline; null without
      baselines. False covers "worse" and "unclear", and the second sentence says which.
    best_untuned, tuned_beats_untuned: the same of the ways in which the original model answered
      beside the plain one (see UNTUNED); null where it did not.
    sentences: what tuning did; how that compares with what needs no language model and, where it
      was tried, with what needs no tuning; what remains.
    """
    best, beats = _best_rival(entry["baselines"], entry["baseline_tests"])
    untuned_tests = entry.get("variant_tests")
    untuned, beats_untuned = _best_rival(entry.get("variants"), untuned_tests)
    sentences = [_tuning(entry), _against_baselines(entry, best, beats)]
    if untuned is not None:
        sentences.append(_against_untuned(entry, untuned, beats_untuned))
    return {
        "best_baseline": best,
        "tuned_beats_baseline": beats,
        "best_untuned": untuned,
        "tuned_beats_untuned": beats_untuned,
        "sentences": [*sentences, _remains(entry)],
    }


def _best_rival(
    scores: Mapping[str, Mapping] | None, tests: Mapping[str, Mapping] | None
) -> tuple[str | None, bool | None]:
    """Of those that `tests` hold against the tuned model: whom it stands worst to, of several the
    most accurate, and are all beaten. The most accurate alone would not do: one that is right on
    other cases can be less accurate and yet not told apart."""
    if not scores or not tests:
        return None, None
    worst = ("better", "unclear", "worse").index
    stands = {name: standing(found) for name, found in tests.items()}
    best = max(tests, key=lambda n: (worst(stands[n]), scores[n]["accuracy"]["value"]))
    return best, stands[best] == "better"


def _tuning(entry: Mapping) -> str:
    original, tuned = (entry[model]["accuracy"]["value"] for model in ("original", "tuned"))
    difference, p = entry["tests"]["difference"], main_test(entry["tests"])["p_value"]
    adjusted, n = adjusted_p(entry["tests"]), entry["tuned"]["n"]
    kind = "training" if entry["tuned"].get("split") == "train" else "held-out"
    if original == tuned == 0:
        change = "no answer is right, before tuning or after it"
    elif original == tuned == 1:
        change = "every answer is right, before tuning and after it"
    elif original == tuned:
        change = f"tuning left accuracy at {_percent(tuned)}"
    else:
        verb = "raised" if tuned > original else "lowered"
        change = f"tuning {verb} accuracy from {_percent(original)} to {_percent(tuned)}"
    said = ""
    if tuned > original and adjusted > 0.05:
        said = ", which chance alone could explain"
    elif tuned > original and (against := doubts(entry["tests"])):
        by = " by patient" if several_each(entry["tests"]) else ""
        said = f". The Wilcoxon test{by} finds a gain, but {' and '.join(against)}"
    return (
        f"On {n:,} {kind} case{'s' if n > 1 else ''} {change} (difference "
        f"{100 * difference['value']:+.1f} points{_range(difference)}; one-sided "
        f"{main_name(entry['tests'])} {_p(p)}"
        f"{f', after Holm {_p(adjusted)}' if adjusted != p else ''}){said}."
    )


def _against_baselines(entry: Mapping, best: str | None, beats: bool | None) -> str:
    if best is None:
        return "How simple baselines do is not known: the cohort they learn from was not at hand."
    reached = _percent(entry["baselines"][best]["accuracy"]["value"])
    if none_right(entry["tuned"], entry["baselines"][best]):
        return "No answer of the tuned model or of any simple baseline is right."
    difference = entry["baseline_tests"][best]["difference"]
    figures = f"(tuned {100 * difference['value']:+.1f} points{_range(difference)})"
    if beats:
        return (
            f"It beats every simple baseline; the best, {NAMES[best]}, reaches {reached} {figures}."
        )
    if standing(entry["baseline_tests"][best]) == "worse":
        return (
            f"A simple baseline does better than the tuned model: {NAMES[best]} reaches {reached} "
            f"{figures}."
        )
    return (
        "A simple baseline does no worse than the tuned model as far as these cases tell: "
        f"{NAMES[best]} reaches {reached} {figures}."
    )


def _against_untuned(entry: Mapping, best: str, beats: bool) -> str:
    reached = _percent(entry["variants"][best]["accuracy"]["value"])
    if none_right(entry["tuned"], entry["variants"][best]):
        return (
            f"No answer of the original model {UNTUNED[best]} is right, nor is any of the tuned "
            "one."
        )
    difference = entry["variant_tests"][best]["difference"]
    figures = f"(tuned {100 * difference['value']:+.1f} points{_range(difference)})"
    if beats:
        return f"It beats the original model {UNTUNED[best]}, which reaches {reached} {figures}."
    if standing(entry["variant_tests"][best]) == "worse":
        return (
            f"Without any tuning the original model {UNTUNED[best]} does better than the tuned "
            f"one: it reaches {reached} {figures}."
        )
    return (
        f"Without any tuning the original model {UNTUNED[best]} does no worse than the tuned one "
        f"as far as these cases tell: it reaches {reached} {figures}."
    )


def _remains(entry: Mapping) -> str:
    tuned = entry["tuned"]
    n, unread = tuned["n"], tuned["unparseable"]
    wrong = n - round(n * tuned["accuracy"]["value"])
    if not wrong:
        text = "No answer of the tuned model is wrong"
    elif wrong == n:
        text = f"All {n:,} answers" if n > 1 else "The only answer"
        text += f" of the tuned model {'are' if n > 1 else 'is'} wrong"
    else:
        verb = "are" if wrong > 1 else "is"
        text = f"{wrong:,} of the tuned model's {n:,} answers {verb} wrong ({_percent(wrong / n)})"
    if unread:
        of_them = "all of them " if unread == wrong else f"{unread:,} of them "
        text += f", {of_them if wrong > 1 else ''}unparseable"
    hidden = (entry["details"].get("high_rouge_wrong_share") or {}).get("tuned")
    if hidden and (count := round(n * hidden["value"])):
        sound = "sounds" if count == 1 else "sound"
        text += f"; {count:,} {sound} right (ROUGE-1) with a wrong dose, boost, side or kind"
    if entry["ceiling"] is not None:
        text += f"; the ceiling is {_percent(entry['ceiling'])}"
    else:
        text += "; the ceiling is not known"
    return text + "."
