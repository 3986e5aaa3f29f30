"""The model card and the TRIPOD-LLM items, filled from manifests where a machine can know.

What only a person can answer stays None, and the page leaves room for it. Nothing is guessed: what
no manifest, no source.json and no figure of the report tells is not told here. All of it is made
from report.json alone, so that the form to be shared can tell no more than its figures.

Items after Gallifant et al., Nat Med 2025;31:60 (doi 10.1038/s41591-024-03425-5), in our own short
words; their wording and the explanations are in the paper.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from radonc_jax.evaluation.figures import TITLES, name_of
from radonc_jax.evaluation.run import is_number

# (item, section, what it asks for)
TRIPOD_LLM = (
    ("1", "Title", "Developing, tuning or evaluating an LLM; task, population, outcome"),
    ("2a-2l", "Abstract", "Structured summary of all of the following"),
    ("3a", "Introduction", "Healthcare context, use case, rationale, existing approaches"),
    ("3b", "Introduction", "Target population, place in the care pathway, intended users"),
    ("4", "Introduction", "Objectives; development, tuning or validation"),
    ("5a", "Data", "Sources of training, tuning and evaluation data, and why these"),
    ("5b", "Data", "Distribution and descriptors of the data"),
    ("5c", "Data", "Dates of the oldest and the newest text"),
    ("5d", "Data", "Preprocessing and quality checks"),
    ("5e", "Data", "Missing and imbalanced data, reasons for omissions"),
    ("6a", "Methods", "Name, version and date of the LLM"),
    ("6b", "Methods", "Architecture, hyperparameters, inference settings"),
    ("6c", "Methods", "Training and fine-tuning procedure, alignment"),
    ("6d", "Methods", "Raw and post-processed output"),
    ("6e", "Methods", "Classification: probabilities and thresholds"),
    ("6f", "Methods", "Measures of the quality of generated text"),
    ("6g", "Methods", "Relevance of the measures, correlation with human judgement"),
    ("7a", "Output", "Outcome, how answers are computed, measures with formulae"),
    ("7b", "Output", "Subjective assessment: assessors, instructions, agreement"),
    ("7c", "Output", "Comparison with other models, people, benchmarks"),
    ("8a", "Annotation", "How text was labelled, guidelines"),
    ("8b", "Annotation", "Number of annotators, share annotated twice"),
    ("8c", "Annotation", "Annotators' background, agreement between them"),
    ("9a", "Prompting", "How prompts were designed and chosen"),
    ("9b", "Prompting", "Data used to develop prompts"),
    ("10", "Summarisation", "Preprocessing before summarisation"),
    ("11", "Instruction tuning", "Instructions, interface, evaluating population"),
    ("12", "Compute", "Time, machines, cost"),
    ("13", "Ethics", "Committee, consent or waiver"),
    ("14a", "Open science", "Funding and the funders' role"),
    ("14b", "Open science", "Conflicts of interest"),
    ("14c", "Open science", "Protocol"),
    ("14d", "Open science", "Registration"),
    ("14e", "Open science", "Availability of data"),
    ("14f", "Open science", "Availability of code"),
    ("15", "Public involvement", "Patients and the public in the study"),
    ("16a", "Results", "Flow of patients and texts, with and without the label"),
    ("16b", "Results", "Characteristics, overall and by split, with key dates"),
    ("16c", "Results", "Predictors in development and evaluation data compared"),
    ("16d", "Results", "Numbers of patients and outcomes in each analysis"),
    ("17", "Results", "Performance by the measures chosen beforehand"),
    ("18", "Results", "Updating of the LLM and its result"),
    ("19a", "Discussion", "Interpretation, fairness, previous studies"),
    ("19b", "Discussion", "Limitations, bias, uncertainty, generalisability"),
    ("19c", "Discussion", "Known difficulties of data for this task"),
    ("19d", "Discussion", "Intended use: input, user, autonomy and oversight"),
    ("19e", "Discussion", "Poor or missing input"),
    ("19f", "Discussion", "What users must do, and the expertise they need"),
    ("19g", "Discussion", "Next steps"),
)


# Keys of config.json that say how a model was trained and asked.
_SETTINGS = (
    *("task", "seed", "trainable", "lora", "precision", "batch", "optimizer", "train", "decode"),
)
_COHORT = (
    *("assessed", "kept", "excluded", "rules", "rules_turned_off", "stripped"),
    *("cases", "patients", "ceiling"),
)


def facts(config: Mapping, cohort: Mapping, split: str) -> dict:
    """{settings, cohort}: what the card and the items tell of a run's config.json and of its
    cohort's manifest.json, in report.json. No folder, no name of a person or of a sheet."""
    settings = {name: config[name] for name in _SETTINGS if name in config}
    if "lora" in settings:
        settings["lora"] = {k: v for k, v in settings["lora"].items() if k != "init_from"}
    told = {name: cohort[name] for name in _COHORT if name in cohort}
    parts = {
        "rows": ("read",),
        "source": ("name", "sha256"),
        "deidentification": ("policy", "rows"),
    }
    for part, names in parts.items():
        if cohort.get(part):
            told[part] = {name: cohort[part][name] for name in names if name in cohort[part]}
    if cohort.get("deidentification"):
        found = cohort["deidentification"].get("classes") or ()
        told["deidentification"]["classes"] = sorted(found)
    if cohort.get("annotation") is not None:
        annotation = cohort["annotation"]
        files, twice = annotation.get("files") or (), annotation.get("annotated_twice", 0)
        told["annotation"] = {
            "sheets": len(files),
            "rows_offered": annotation.get("rows_offered", 0),
        }
        if files:
            told["annotation"] |= {
                "adjudicated": "adjudication" in annotation,
                "rows": sum(file["entries"] for file in files) - twice,
                "rows_twice": twice,
                "agreement": annotation.get("agreement") or {},
            }
    table1 = cohort.get("table1") or {}
    if cohort:
        told |= {"table1": "table1" in cohort, "flow": "flow" in cohort}
    largest = (table1.get("largest_difference") or {}).get(split)
    if largest and is_number(largest["smd"]):
        told["largest_difference"] = {name: largest[name] for name in ("characteristic", "smd")}
    return {"settings": settings, "cohort": told}


@dataclass(frozen=True)
class Source:
    """What report.json tells of one run.

    Attributes:
      entries: the run's tasks -> entry of report.json.
      split: the split that was evaluated.
      model: the base's name, if known.
      settings, cohort: see `facts`; {} where the run has no config.json, or no cohort at hand.
      manifest: the run's manifest.json; {} where the folder has none.
      answers: model -> how it was asked, by its source.json; {} where there is none.
    """

    entries: Mapping[str, Mapping]
    split: str
    model: str | None = None
    settings: Mapping = field(default_factory=dict)
    cohort: Mapping = field(default_factory=dict)
    manifest: Mapping = field(default_factory=dict)
    answers: Mapping = field(default_factory=dict)


def disclose(report: Mapping) -> dict[str, dict]:
    """The `disclosure` of report.json, made anew: {run: {settings, cohort, base {name,
    architecture, layers, parameters; null where not known} or null, model_card, tripod_llm {filled,
    lines, items}}}. Of the run's `disclosure` only `facts` need to be there."""
    result = {}
    for name, known in report["disclosure"].items():
        provenance = report["provenance"][name]
        source = Source(
            entries={
                task: entry
                for task, first in report["tasks"].items()
                for entry in (first, *first["further_runs"])
                if entry["run"] == name
            },
            split=report["split"],
            model=provenance.get("model"),
            settings=known["settings"],
            cohort=known["cohort"],
            manifest=provenance.get("manifest") or {},
            answers=provenance.get("answers") or {},
        )
        items = tripod_llm(source)
        result[name] = {
            "settings": known["settings"],
            "cohort": known["cohort"],
            "base": _base_facts(source),
            "model_card": model_card(source),
            "tripod_llm": {
                "filled": sum(item["answer"] is not None for item in items),
                "lines": len(items),
                "items": items,
            },
        }
    return result


def model_card(source: Source) -> dict[str, dict[str, str | None]]:
    """Heading -> name -> text; None is for a person to fill in."""
    tasks = ", ".join(TITLES[task].lower() for task in source.entries)
    return {
        "Intended use": {
            "Purpose": f"Research: answer from one diagnosis text the {tasks}.",
            "Not for": "Clinical decisions; other kinds of text; text in other languages than "
            "that of the training data.",
            "Users, place in the care pathway, oversight": None,
        },
        "Model": {
            "Base": _base(source),
            "What was trained": _trained(source),
            "Versions": _versions(source),
            "Compute": _compute(source),
            "Hours, energy and cost": None,
            "Owner, contact, licence of the weights": None,
        },
        "Data": {
            "Cohort": _cohort(source),
            "Left out": _excluded(source),
            "Splits": _splits(source),
            "Identifiers": _identifiers(source),
            "Origin, period, population": None,
            "Approval and consent": None,
        },
        "Training and decoding": {
            "Settings": _settings(source),
            "Decoding": _decoding(source),
        },
        "Evaluation": {
            **{TITLES[task]: _result(entry) for task, entry in source.entries.items()},
            "Where it fails": _failures(source),
            "Rated by physicians": None,
        },
        "Risks and their handling": {
            "Harm of a wrong answer, and who notices it": None,
            "Fairness": None,
            "Updating and withdrawal": None,
        },
    }


def tripod_llm(source: Source) -> list[dict[str, str | None]]:
    """A row per item of TRIPOD_LLM: {item, section, asks, answer}; answer None is for a person."""
    tasks = ", ".join(TITLES[task].lower() for task in source.entries)
    data = _known(_cohort(source), _splits(source))
    answers = {
        "1": f"Fine-tuning and evaluation of a language model. Task: {tasks}. "
        "Population and setting: for the authors.",
        "4": "Fine-tuning, and paired comparison of the tuned with the original model on the same "
        f"{cases_of(source.split)} (split {source.split}).",
        "5a": _sources(source),
        "5b": data,
        "5d": _preprocessing(source),
        "5e": _excluded(source),
        "6a": _base(source),
        "6b": _known(_decoding(source), _settings(source)),
        "6c": _known(_trained(source), _settings(source)),
        "6d": "Raw text and the answer read from it, case by case, in predictions.jsonl.",
        "6e": _classified(source),
        "6f": "ROUGE-1"
        + (
            ", with and without whole decimal numbers, beside the accuracy, which is told field by "
            "field too."
            if "regimen" in source.entries
            else " beside the accuracy."
        ),
        "7a": "Section Definitions of this report; formulae in the docstrings of the code.",
        "7c": _comparisons(source),
        "8a": _annotation(source),
        "8b": _annotators(source),
        "8c": _agreement(source),
        "9a": _prompts(source),
        "9b": _prompt_data(source),
        "10": "Does not apply: no summarisation.",
        "12": _compute(source),
        "16a": _flow(source),
        "16b": "table1.html in the cohort folder." if source.cohort.get("table1") else None,
        "16c": _shift(source),
        "16d": _splits(source),
        "17": " ".join(f"{TITLES[task]}: {_result(e)}" for task, e in source.entries.items()),
        "19e": _poor_input(source),
        "14f": _code(source),
    }
    return [
        {"item": item, "section": section, "asks": asks, "answer": answers.get(item) or None}
        for item, section, asks in TRIPOD_LLM
    ]


def last_part(model: str | None) -> str | None:
    """Of a folder, whose path is nobody's business, or of a hub id."""
    return None if model is None else re.split(r"[/\\]", model.rstrip("/\\"))[-1]


def is_synthetic(cohort: Mapping) -> bool:
    """Whether a cohort's facts say that its cases are made up: of real ones nobody knows the
    ceiling."""
    return bool(cohort.get("ceiling"))


def _base_facts(source: Source) -> dict | None:
    """`base` of a run's `disclosure`."""
    name = last_part(source.model or (source.manifest.get("base") or {}).get("folder"))
    if not name:
        return None
    told = source.manifest.get("architecture") or {}
    return {
        "name": name,
        "architecture": told.get("name"),
        "layers": told.get("layers"),
        "parameters": told.get("parameters") or _frozen(source),
    }


def _frozen(source: Source) -> int | None:
    """Parameters of a base by the manifest of an older version: those that lay under the adapter.
    None where they are not the base as it was given."""
    stored = str((source.settings.get("precision") or {}).get("base"))
    if source.settings.get("trainable") != "lora" or not stored.startswith(("float", "bfloat")):
        return None
    return (source.manifest.get("parameters") or {}).get("frozen")


def describe_base(base: Mapping) -> str:
    """Architecture and size of a `base`, as far as they are known: "MistralForCausalLM, 32 layers,
    7.2 B parameters"."""
    return ", ".join(filter(None, (base["architecture"], size_of_base(base))))


def size_of_base(base: Mapping) -> str:
    layers, parameters, told = base["layers"], base["parameters"], []
    if layers:
        told.append(f"{layers} layer{'s' if layers > 1 else ''}")
    if parameters:
        unit, name = next(
            ((unit, name) for unit, name in ((1e9, " B"), (1e6, " M")) if parameters >= unit),
            (1, ""),
        )
        number = f"{parameters / unit:.1f}" if name else f"{parameters:,}"
        told.append(f"{number}{name} parameters")
    return ", ".join(told)


def cases_of(split: str) -> str:
    """What the cases of a split are to the tuned model."""
    return "training cases" if split == "train" else "held-out cases"


def _known(*texts: str | None) -> str | None:
    return " ".join(text for text in texts if text) or None


def _number(value) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _listed(counts: Mapping) -> str:
    return ", ".join(f"{str(key).replace('_', ' ')} {_number(n)}" for key, n in counts.items())


def _base(source: Source) -> str | None:
    base = source.manifest.get("base") or {}
    name = source.model or base.get("folder")
    if not name:
        return None
    hashes = base.get("sha256") or {}
    weights = [f"{file} {value[:12]}" for file, value in sorted(hashes.items())]
    revision, known = base.get("revision"), _base_facts(source)
    kind = describe_base(known) if known else None
    return _known(
        f"{name}{f', revision {revision}' if revision else ''}.",
        f"{kind}." if kind else None,
        f"SHA-256 of its files begin: {', '.join(weights)}." if weights else None,
    )


def _trained(source: Source) -> str | None:
    parameters = source.manifest.get("parameters") or {}
    if not parameters:
        return None
    text = f"{_number(parameters['trainable'])} parameters trained"
    lora = source.settings.get("lora") or {}
    if source.settings.get("trainable") == "lora" and lora:
        text += (
            f" (LoRA, rank {lora.get('rank')}, alpha {lora.get('alpha')}, dropout "
            f"{lora.get('dropout')}, on {', '.join(lora.get('targets') or ())})"
        )
    text += f", {_number(parameters['frozen'])} frozen."
    before, after = (source.manifest.get(f"base_fingerprint_{w}") for w in ("before", "after"))
    if after is not None:
        text += " The frozen weights were the same before and after." if before == after else ""
    return _known(text, _checkpoint(source))


def _checkpoint(source: Source) -> str | None:
    """Which one answered: `evaluate --step` may take another than the best."""
    best, step = source.manifest.get("best_step"), source.answers.get("tuned", {}).get("step")
    chosen = f"Checkpoint of step {_number(best)} was chosen on validation" if best else None
    if step is None or step == best:
        return chosen and f"{chosen}."
    return f"{f'{chosen}; that' if best else 'That'} of step {_number(step)} gave these answers."


def _versions(source: Source) -> str | None:
    environment = source.manifest.get("environment") or {}
    if not environment:
        return None
    packages = {"python": environment.get("python")} | (environment.get("versions") or {})
    return _known(
        _listed({k: v for k, v in packages.items() if v}) + ".",
        _code(source),
    )


def _code(source: Source) -> str | None:
    revision = (source.manifest.get("environment") or {}).get("code_revision")
    return f"Code revision {revision}." if revision else None


def _compute(source: Source) -> str | None:
    environment = source.manifest.get("environment") or {}
    if not environment.get("devices"):
        return None
    steps = source.manifest.get("steps")
    return (
        f"{environment.get('device_count')} device(s): {', '.join(environment['devices'])}, "
        f"{environment.get('process_count')} process(es)"
        + (f"; {_number(steps)} optimiser steps." if steps else ".")
    )


def _cohort(source: Source) -> str | None:
    cohort = source.cohort
    if not cohort.get("assessed"):
        return None
    text = f"{_number(cohort['kept'])} patients kept"
    if isinstance(cohort["assessed"], int):  # hidden in the published form where it tells few
        text += f" of {_number(cohort['assessed'])} assessed"
    text += "."
    if is_synthetic(cohort):
        text += " The cases are synthetic"
        text += ": their ceiling is known." if source.split == "test" else "."
    digest = (source.manifest.get("cohort") or {}).get("manifest_sha256")
    return text + (f" SHA-256 of its manifest begins {digest[:12]}." if digest else "")


def _excluded(source: Source) -> str | None:
    excluded = source.cohort.get("excluded")
    if not excluded:
        return None
    return f"Left out, by first reason: {_listed(excluded)}."


def _splits(source: Source) -> str | None:
    cases, patients = source.cohort.get("cases"), source.cohort.get("patients")
    if not cases:
        n = next((entry["tuned"]["n"] for entry in source.entries.values()), None)
        return None if n is None else f"{_number(n)} cases of split {source.split} answered."
    parts = [
        f"{split} {_number(n)} cases of {_number((patients or {}).get(split, '?'))} patients"
        for split, n in cases.items()
    ]
    return f"{'; '.join(parts)}. No patient is in two splits."


def _identifiers(source: Source) -> str | None:
    found = source.cohort.get("deidentification")
    if not found:
        return None
    rows = found.get("rows", 0)
    return (
        f"Policy {found['policy']!r}: identifiers found in {_number(rows)} rows"
        + (f" ({', '.join(sorted(found['classes']))})." if found.get("classes") else ".")
        + " The search supports de-identification, it certifies nothing."
    )


def _settings(source: Source) -> str | None:
    config = source.settings
    if not config.get("optimizer"):
        return None
    parts = [
        f"{name} {value}"
        for section in ("train", "batch", "optimizer", "precision")
        for name, value in (config.get(section) or {}).items()
    ]
    return f"Seed {config.get('seed')}; {', '.join(parts)}.".replace("_", " ")


def _decoding(source: Source) -> str | None:
    tokens = _asked(source, "max_new_tokens", (source.settings.get("decode") or {}))
    if tokens is None:
        return None
    return f"Greedy (temperature 0), at most {_number(tokens)} new tokens."


def _asked(source: Source, name: str, section: Mapping):
    """How the tuned model was asked: by its source.json, else as the config says."""
    return source.answers.get("tuned", {}).get(name, section.get(name))


def _variants(source: Source):
    """(task, variant's name on the page, its settings) of all entries."""
    return [
        (task, name_of(name, asked), name, asked)
        for task, entry in source.entries.items()
        for name, asked in entry["variant_settings"].items()
    ]


def _classified(source: Source) -> str | None:
    if _decoding(source) is None:
        return None
    parts = ["The answer is read from greedily decoded text, without a threshold."]
    ways = {
        "labels": "every label is scored, and the likeliest is the answer",
        **dict.fromkeys(("table", "cohort"), "the text can only become a code of the set"),
    }
    for task, called, _, asked in _variants(source):
        if asked["closed_set"] in ways:
            parts.append(f"{called} ({TITLES[task]}): {ways[asked['closed_set']]}.")
    if any(entry["confidence"].get("tuned") for entry in source.entries.values()):
        parts.append(
            "Confidence is the probability that the model gives its own answer; where labels are "
            "scored, among all of them."
        )
    return " ".join(parts)


def _examples(source: Source) -> list[str]:
    """Each way of asking that shows training cases, in words, once."""
    found = []
    for _, called, name, asked in _variants(source):
        if name == "original_examples":
            number, seed = asked["examples"], source.answers.get(name, {}).get("seed")
            shown = "an untold number of" if number is None else _number(number)
            found.append(
                f"{called}: {shown} training case{'' if number == 1 else 's'} of the cohort"
                + ("" if seed is None else f", drawn with seed {seed},")
            )
    return list(dict.fromkeys(found))


def _prompts(source: Source) -> str | None:
    if _decoding(source) is None:
        return None
    return _known(
        "One fixed prompt per task (an instruction, the diagnosis text), the same in training and "
        "decoding.",
        *(f"{shown} with the right answers before it." for shown in _examples(source)),
    )


def _prompt_data(source: Source) -> str | None:
    """Of the data in prompts; what their wording was tried on, no manifest tells."""
    if _decoding(source) is None:
        return None
    shown = _examples(source)
    if not shown:
        return (
            "No case stands in a prompt but the one that is asked. On what the wording was tried: "
            "for the authors."
        )
    return (
        f"{'; '.join(f'{text} in each prompt' for text in shown)}. In other prompts no case stands "
        "but the one that is asked. On what the wording was tried: for the authors."
    )


_REQUIRED = {
    "diagnosis_present": "without diagnosis text",
    "modality_identifiable": "without a modality that can be told",
    "regimen_complete": "without dose and fractions that agree",
    "code_present": "without one ICD-10-CM code",
    "code_valid": "with a code that cannot be billed",
}
_TOO_LONG = {
    "trim_diagnosis": "A diagnosis text that is too long for the model is cut at its end.",
    "fail": "A text that is too long for the model is an error.",
    "drop": "A text that is too long for the model is an error when it is asked.",
}


def _poor_input(source: Source) -> str | None:
    rules = source.cohort.get("rules") or ()
    missing = [words for rule, words in _REQUIRED.items() if rule in rules]
    policy = _asked(source, "over_length", source.settings.get("batch") or {})
    return _known(
        f"Left out beforehand: cases {', '.join(missing)}." if missing else None,
        _TOO_LONG.get(policy),
        "An unparseable answer counts as wrong: "
        + ", ".join(
            f"{TITLES[task]} {_number(entry['tuned']['unparseable'])} of "
            f"{_number(entry['tuned']['n'])} tuned"
            for task, entry in source.entries.items()
        )
        + ".",
    )


def _percent(score: Mapping) -> str:
    text = f"{100 * score['value']:.1f} %"
    if score.get("low") is not None:
        text += f" ({100 * score['low']:.1f} to {100 * score['high']:.1f})"
    return text


def _result(entry: Mapping) -> str:
    return (
        f"accuracy {_percent(entry['original']['accuracy'])} original, "
        f"{_percent(entry['tuned']['accuracy'])} tuned, n {_number(entry['tuned']['n'])}."
    )


def _failures(source: Source) -> str | None:
    parts = []
    for task, entry in source.entries.items():
        tuned = entry["tuned"]
        wrong = tuned["n"] - round(tuned["accuracy"]["value"] * tuned["n"])
        parts.append(
            f"{TITLES[task]}: {_number(wrong)} of {_number(tuned['n'])} wrong, "
            f"{_number(tuned['unparseable'])} of them unparseable."
        )
    return " ".join(parts) or None


def _sources(source: Source) -> str | None:
    origin = source.cohort.get("source") or {}
    if not origin.get("sha256"):
        return None
    rows = (source.cohort.get("rows") or {}).get("read")
    return (
        "One extract for all splits"
        + (f", {origin['name']}" if origin.get("name") else "")  # none in the published form
        + (f", {_number(rows)} rows" if rows else "")
        + f" (SHA-256 begins {str(origin.get('sha256'))[:12]}). Why these: for the authors."
    )


def _preprocessing(source: Source) -> str | None:
    cohort = source.cohort
    if not cohort.get("rules"):
        return None
    text = f"Rules in order: {', '.join(cohort['rules']).replace('_', ' ')}."
    if cohort.get("rules_turned_off"):
        text += f" Turned off: {', '.join(cohort['rules_turned_off']).replace('_', ' ')}."
    if cohort.get("stripped"):
        text += f" Answers taken out of the diagnosis texts: {_listed(cohort['stripped'])}."
    return _known(text, _identifiers(source))


def _annotation(source: Source) -> str | None:
    annotation = source.cohort.get("annotation")
    if annotation is None:
        return None
    sheets = annotation.get("sheets", 0)
    offered = annotation.get("rows_offered", 0)
    if not sheets:
        return (
            f"Labels come from the records; {_number(offered)} uncertain rows were offered to "
            "annotators, none was annotated."
        )
    return f"{sheets} annotation sheet(s) were read back, for rows that the rules left uncertain."


def _annotators(source: Source) -> str | None:
    annotation = source.cohort.get("annotation") or {}
    if not annotation.get("sheets"):
        return None
    one = annotation["sheets"] == 1
    people = "1 annotator" if one else f"{annotation['sheets']} annotators"
    if annotation["adjudicated"]:
        people += " and an adjudicator"
    return (
        f"{people}. Rows annotated: {_number(annotation['rows'])}"
        + ("." if one else f", by both: {_number(annotation['rows_twice'])}.")
        + " All other labels come from the records."
    )


def _agreement(source: Source) -> str | None:
    """Of what was annotated twice; None where nothing was."""
    agreement = (source.cohort.get("annotation") or {}).get("agreement") or {}
    fields = []
    for name, found in agreement.items():
        if not found["n"]:
            continue
        told = f"{name.replace('_', ' ')} (n {_number(found['n'])})"
        if found["equal"] is not None:
            told += f" equal {found['equal']:.2f}"
        if found["kappa"] is not None:
            told += f" kappa {found['kappa']:.2f}"
        fields.append(told)
    if not fields:
        return None
    return (
        "Share of equal entries of two annotators and Cohen's kappa, where it is defined: "
        f"{'; '.join(fields)}. Their background: for the authors."
    )


def _comparisons(source: Source) -> str | None:
    names: list[str] = []
    for entry in source.entries.values():
        others = [*(entry.get("variants") or {}), *(entry["baselines"] or {})]
        called = (name_of(name, entry["variant_settings"].get(name)) for name in others)
        names += [name.lower() for name in called if name.lower() not in names]
    compared = ", ".join(names)
    return "The original model on the same cases" + (f"; {compared}." if compared else ".")


def _flow(source: Source) -> str | None:
    cohort = source.cohort
    if not cohort.get("assessed"):
        return None
    return _known(_cohort(source), "flow.svg in the cohort folder." if cohort.get("flow") else None)


def _shift(source: Source) -> str | None:
    largest = source.cohort.get("largest_difference")
    if not largest:
        return None
    return (
        f"Largest standardised difference between train and {source.split}: "
        f"{largest['characteristic']}, {largest['smd']:.2f}."
    )
