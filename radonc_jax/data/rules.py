"""Inclusion rules: who is kept, who is not, and why.

The unit that is assessed, kept or excluded is the patient case: all rows of one patient. A kept
case is the one row of its patient that the rules leave, the primary plan. Every other row has a
reason, those of kept patients too ("boost_plan").

A rule takes the rows that are left and gives a text for each: "" for those that stay, else the
reason, which may go on with a detail after a colon ("code_not_valid: C61.0; nearest C61"). Rules
run in the order of RULES; some fill columns that later rules and the cohort need. What annotators
have settled stands in columns `annotated_*` and goes before what can be read from the other fields.
"""

import importlib.util
import inspect
import re
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from radonc_jax.data.extract import ANNOTATED, COLUMNS
from radonc_jax.data.splits import strip_answers
from radonc_jax.tasks.icd import distinct_codes, is_leaf, nearest_valid, normalise_code
from radonc_jax.tasks.modality import identify_modality
from radonc_jax.tasks.regimen import DOSE_TOLERANCE_GY, Regimen, parse_regimen, render_regimen

# Patient cases by number: rows with one number are of one patient. Nameless rows are a case each.
CASE = "case_number"
REPLACED = "replaced_original"  # see plan_delivered

LEAST_PATIENTS = 11  # fewer could be known by what they share

NO_TEXT = frozenset(
    {"", "-", "--", "n/a", "na", "nan", "none", "null", "unknown", ".", "?", "<na>", "nat"}
)

# What is given outside implants; beyond it a unit or a comma was most likely misread.
MOST_GY_A_FRACTION = 34
MOST_GY_OF_RADIOSURGERY = 100  # in one fraction: 70 to 90 Gy to the trigeminal nerve
MOST_GY = 120  # of a course
LEAST_GY_A_FRACTION = 0.1  # less is Gy in a column of cGy
_RADIOSURGERY = re.compile(r"\bsrs\b|radiosurg|gamma.?knife|\bgkr?s?\b", re.IGNORECASE)
_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_DECIMAL_COMMA = re.compile(r"\d+,\d{1,2}")

Rule = Callable[[pd.DataFrame], pd.Series]


def _column(rows: pd.DataFrame, name: str) -> pd.Series:
    if name in rows.columns:
        return rows[name]
    return pd.Series("", index=rows.index, dtype="str")


def _words(rows: pd.DataFrame, name: str) -> pd.Series:
    """In lower case, underscores as spaces, so that \\b finds the parts of "PROST_BST"."""
    return _column(rows, name).str.lower().str.replace("_", " ", regex=False)


def _is_blank(texts: pd.Series) -> pd.Series:
    return texts.str.lower().isin(NO_TEXT)


def _has(rows: pd.DataFrame, pattern: str, *names: str) -> pd.Series:
    found = pd.Series(False, index=rows.index)
    for name in names:
        if name in rows.columns:
            found |= _words(rows, name).str.contains(pattern)
    return found


def _reasons(rows: pd.DataFrame, *cases: tuple[pd.Series, str]) -> pd.Series:
    """The first reason whose mask holds."""
    reasons = pd.Series("", index=rows.index, dtype=object)
    for mask, reason in reversed(cases):
        reasons[mask] = reason
    return reasons


def _of_case(rows: pd.DataFrame, mask: pd.Series, *within: str) -> pd.Series:
    """Whether the case (and the same course, if `within` names it) has a row of `mask`."""
    keys = [rows[CASE], *(_column(rows, name) for name in within)]
    return mask.groupby(keys).transform("any")


def _several(rows: pd.DataFrame) -> pd.Series:
    """Whether the case has more rows than one."""
    return rows[CASE].duplicated(keep=False)


def _each_distinct(function: Callable, *columns: pd.Series) -> list:
    """`function` of every row's values; each distinct set is read once, for exports repeat."""
    known: dict[tuple, object] = {}
    results = []
    for values in zip(*columns, strict=True):
        result = known.get(values, known)
        if result is known:
            result = known[values] = function(*values)
        results.append(result)
    return results


# ---------------------------------------------------------------------------------------------
# Patient, diagnosis record, plan
# ---------------------------------------------------------------------------------------------


def patient_known(rows: pd.DataFrame) -> pd.Series:
    """A row without a patient cannot be kept out of two splits. Each counts as a case."""
    return _reasons(rows, (_is_blank(rows["patient_id"]), "no_patient_id"))


def row_not_repeated(rows: pd.DataFrame) -> pd.Series:
    """The same row again, in every column, is no second plan."""
    names = [name for name in rows.columns if name != CASE]
    several = rows[_several(rows)]
    again = several[several.duplicated(names)].index
    return _reasons(rows, (rows.index.to_series().isin(again), "repeated_row"))


def single_diagnosis(rows: pd.DataFrame) -> pd.Series:
    """One diagnosis record per patient: one record number, one text, one code, where given."""
    some = rows[_several(rows)]
    several = pd.Series(False, index=rows.index)
    for name in ("diagnosis_id", "diagnosis", "icd10"):
        values = _column(some, name).str.lower().str.split().str.join(" ")
        if name == "icd10":
            values = values.str.replace(".", "", regex=False)
        values = values[~values.isin(NO_TEXT)]
        counts = values.groupby(some.loc[values.index, CASE]).nunique()
        several |= rows[CASE].isin(counts.index[counts > 1])
    return _reasons(rows, (several, "several_diagnoses"))


def annotators_decision(rows: pd.DataFrame) -> pd.Series:
    """What annotators settled: which row is the primary plan, which is none and why. Rules that
    tell plans apart leave a settled primary plan alone."""
    primary = _settled(rows)
    excluded = _column(rows, "annotated_decision") == "exclude"
    reasons = _reasons(rows, (_of_case(rows, primary) & ~primary, "not_the_annotated_plan"))
    given = _column(rows, "annotated_reason")[excluded]
    reasons[excluded] = given.where(given != "", "excluded_by_annotators")
    return reasons


def _settled(rows: pd.DataFrame) -> pd.Series:
    return _column(rows, "annotated_decision") == "primary"


# How systems word a plan's status; runs of letters too ("PlanningApproved").
_CANCELLED = (
    r"cancel|un[ -]?approv|reject|abort|not[ -]?(?:treated|delivered)|draft|planning[ -]?only"
    r"|\bvoid"
)
_NOT_COMPLETED = r"discontinu|completed[ -]?early|\bon[ -]?hold|not[ -]?started|^planned$|^planning"
_SUPERSEDED = r"supersed|re-?plan|retired|replaced|obsolete"
_TREATED = (
    r"^(?:treatment[ -]?|externally[ -]?|plan[ -]?)?approved$|^(?:treatment[ -]?)?completed?$"
    r"|^(?:treated|delivered|active|in[ -]?progress|finished|done|reviewed|closed|yes)$"
)
_QA = r"\b(?:qa|phantom|test)\b"
_INTEGRATED = r"\bsib\b|\bintegrated\b|\bconcomitant (?:boost|bst)\b"


def plan_delivered(rows: pd.DataFrame) -> pd.Series:
    """Plans that were given up or replaced are not what the patient was treated with.

    Fills the column `replaced_original`: "yes" where the course had a superseded plan that was no
    re-plan itself.
    """
    cancelled = _has(rows, _CANCELLED, "plan_status")
    partly = _has(rows, _NOT_COMPLETED, "plan_status")
    superseded = _has(rows, _SUPERSEDED, "plan_status")
    quality = _has(rows, _QA, "plan_name")
    replaced = _of_case(rows, superseded & ~_is_replan(rows) & ~quality, "course_id")
    rows[REPLACED] = replaced.map({True: "yes", False: ""}).astype(object)
    return _reasons(
        rows,
        (cancelled, "plan_cancelled"),
        (superseded, "plan_superseded"),
        (partly, "plan_not_completed"),
        (quality & ~_of_case(rows, ~(quality | cancelled | superseded | partly)), "only_qa_plan"),
        (quality, "qa_plan"),
    )


def plan_not_boost(rows: pd.DataFrame) -> pd.Series:
    """A boost has no regimen of its own: it is part of the primary plan's course, as is a later
    phase beside a first one."""
    boost = _has(rows, r"boost|cone.?down", "plan_intent") | _has(
        rows, r"\b(?:boost|bst|cd)\b|cone.?down", "plan_name"
    )
    # An integrated boost is given with the primary plan, in it.
    boost &= ~_has(rows, _INTEGRATED, "plan_name", "plan_intent", "prescription")
    later = _has(rows, r"\bph(?:ase)? ?[2-9]\b", "plan_name", "plan_intent")
    first = _has(rows, r"\bph(?:ase)? ?1\b", "plan_name", "plan_intent")
    later &= _of_case(rows, first, "course_id")
    return _reasons(
        rows,
        (boost & ~_of_case(rows, ~boost), "only_boost_plan"),
        (boost, "boost_plan"),
        (later, "later_phase"),
    )


def _is_replan(rows: pd.DataFrame) -> pd.Series:
    return _has(rows, r"\bre-?plan|\badapt|\brp ?\d\b", "plan_name", "plan_intent")


def plan_not_replan(rows: pd.DataFrame) -> pd.Series:
    """A re-plan during the course goes on with the plan that it adapts, whose regimen counts. One
    that stands alone in its course is the plan; one whose original is superseded may hold no more
    than what was left to give."""
    again = _is_replan(rows)
    original = _of_case(rows, ~again, "course_id")
    replaced = _column(rows, REPLACED) == "yes"
    return _reasons(rows, (again & original, "replan"), (again & replaced, "replan_of_superseded"))


def plan_not_palliative_of_several(rows: pd.DataFrame) -> pd.Series:
    """Beside a plan with another intent a palliative one is not the primary plan. A patient's only
    plan may be palliative; several palliative plans are told apart by nothing."""
    palliative = _has(rows, r"palliat", "plan_intent", "plan_name", "prescription")
    other = _of_case(rows, ~palliative)
    return _reasons(rows, (palliative & other, "palliative_plan"))


def one_primary_plan(rows: pd.DataFrame) -> pd.Series:
    """What is left must be one plan. Two of one course compete, two courses are a re-treatment."""
    several = _several(rows)
    courses = _column(rows, "course_id")[several].groupby(rows.loc[several, CASE]).nunique()
    palliative = _has(rows, r"palliat", "plan_intent", "plan_name", "prescription")
    return _reasons(
        rows,
        (several & ~_of_case(rows, ~palliative), "several_palliative_plans"),
        (rows[CASE].isin(courses.index[courses > 1]), "several_courses"),
        (several, "several_primary_plans"),
    )


# ---------------------------------------------------------------------------------------------
# Question and answers
# ---------------------------------------------------------------------------------------------


def diagnosis_present(rows: pd.DataFrame) -> pd.Series:
    return _reasons(rows, (_is_blank(rows["diagnosis"]), "no_diagnosis_text"))


def modality_identifiable(rows: pd.DataFrame) -> pd.Series:
    """From the field, technique, energy and prescription together; a contradiction is no guess.

    Fills the column `modality` with the label.
    """
    names = ("annotated_modality", "modality", "technique", "energy", "prescription")
    read = _each_distinct(_read_modality, *(_column(rows, name) for name in names))
    rows["modality"] = pd.Series([label for label, _ in read], index=rows.index, dtype=object)
    return pd.Series([reason for _, reason in read], index=rows.index, dtype=object)


def _read_modality(settled: str, *parts: str) -> tuple[str, str]:
    """(label or "", reason or "")."""
    found = identify_modality(settled) if settled else identify_modality(*parts)
    if found.label:
        return found.label, ""
    reason = {
        "unidentifiable": "modality_unknown",
        "contradiction": "modality_contradiction",
        "outside": "modality_outside",
    }[found.reason]
    explained = found.explain()
    return "", f"{reason}: {explained}" if explained else reason


def regimen_complete(rows: pd.DataFrame) -> pd.Series:
    """Dose and fractions, from the prescription or the number fields; both must agree.

    Fills the column `regimen` with the canonical text.
    """
    names = (
        "annotated_regimen", "prescription", "treatment_site", "technique", "modality",
        "fractions", "total_dose_gy", "total_dose_cgy",
    )  # fmt: skip
    read = _each_distinct(_read_regimen, *(_column(rows, name) for name in names))
    rows["regimen"] = pd.Series([text for text, _ in read], index=rows.index, dtype=object)
    return pd.Series([reason for _, reason in read], index=rows.index, dtype=object)


def _number(text: str) -> float | None:
    """ "1,250" is a thousand and more, "50,4" has a decimal comma; None for what is no number."""
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    elif _DECIMAL_COMMA.fullmatch(text):
        text = text.replace(",", ".")
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 < value < float("inf") else None


def _read_regimen(
    settled: str, prescription: str, treatment_site: str, technique: str, modality: str,
    fraction_field: str, gray: str, centigray: str,
) -> tuple[str, str]:  # fmt: skip
    """(canonical text or "", reason or "")."""
    if settled:
        prescription = settled
        treatment_site = technique = fraction_field = gray = centigray = ""
    written = parse_regimen(prescription) if prescription else None
    if written is not None and written.conflict:
        return "", f"regimen_contradiction: {written.conflict}"
    dose = _number(gray)
    if (hundredths := _number(centigray)) is not None:
        if dose is not None and abs(dose - hundredths / 100) > DOSE_TOLERANCE_GY:
            return "", "regimen_contradiction"
        dose = hundredths / 100 if dose is None else dose
    fractions = _number(fraction_field)
    if written is not None and written.total_dose_gy is not None:
        if _fields_agree(dose, fractions, written.total_dose_gy, written.fractions):
            fractions = written.fractions or fractions
        elif written.fractions and written.boost_fractions and _fields_agree(
            # Some exports have all phases together in the number fields.
            dose, fractions, written.course_dose_gy, written.fractions + written.boost_fractions
        ):  # fmt: skip
            fractions = written.fractions
        else:
            return "", "regimen_contradiction"
        dose = written.total_dose_gy
    if dose is None:
        return "", "no_dose"
    if fractions is None or fractions != int(fractions):
        return "", "no_fractions"
    # The site field names the target more plainly than the prescription does; the words around a
    # dose let the parser read it as it reads a regimen.
    place = parse_regimen(f"{treatment_site}, {dose} Gy in 1 fraction")
    if place is not None and place.conflict == "side":  # two places in one field
        return "", "regimen_contradiction: side"
    target, side = (place.target, place.side) if place else (None, None)
    if written is not None:
        if side and written.side and side != written.side:
            return "", "regimen_contradiction"
        target, side = target or written.target, side or written.side
    if target is None:
        return "", "no_target"
    regimen = Regimen(
        target=target,
        side=side,
        total_dose_gy=dose,
        fractions=int(fractions),
        technique=technique or (written.technique if written else None),
        modality=modality,
        times_a_day=written.times_a_day if written else 1,
        boost_dose_gy=written.boost_dose_gy if written else None,
        boost_fractions=written.boost_fractions if written else None,
    )
    if not _is_plausible(regimen, f"{technique} {prescription}"):
        return "", "dose_implausible"
    text = render_regimen(regimen)
    again = parse_regimen(text)
    if again is None or (again.total_dose_gy, again.fractions) != (dose, int(fractions)):
        return "", "regimen_unreadable"
    if again.conflict:  # between fields: "Left breast" by "right tangents"
        return "", f"regimen_contradiction: {again.conflict}"
    return render_regimen(again), ""


def _fields_agree(
    dose: float | None, fractions: float | None, written_dose: float, written_fractions: int | None
) -> bool:
    """Whether the number fields say, where they say anything, what the prescription says."""
    return (dose is None or abs(dose - written_dose) <= DOSE_TOLERANCE_GY) and (
        fractions is None or written_fractions in (None, fractions)
    )


def _is_plausible(regimen: Regimen, said: str) -> bool:
    if regimen.implant:
        return True
    each = regimen.total_dose_gy / regimen.fractions
    if regimen.fractions == 1 and _RADIOSURGERY.search(said):
        return LEAST_GY_A_FRACTION <= each <= MOST_GY_OF_RADIOSURGERY
    return LEAST_GY_A_FRACTION <= each <= MOST_GY_A_FRACTION and regimen.course_dose_gy <= MOST_GY


def code_present(rows: pd.DataFrame) -> pd.Series:
    """Something of the shape of a code, and no second one: which of two is the answer?

    Fills the column `icd10` with the dotted upper-case form.
    """
    settled, text = _column(rows, "annotated_icd10"), rows["icd10"]
    text = text.where(settled == "", settled)
    codes = _each_distinct(lambda value: normalise_code(value) or "", text)
    rows["icd10"] = pd.Series(codes, index=rows.index, dtype=object)
    several = _each_distinct(lambda value: len(distinct_codes(value)) > 1, text)
    return _reasons(
        rows,
        (_is_blank(text), "no_code"),
        (rows["icd10"] == "", "code_not_valid"),
        (pd.Series(several, index=rows.index, dtype=bool), "code_contradiction"),
    )


def code_valid(rows: pd.DataFrame) -> pd.Series:
    """A leaf of the pinned code table; headers and invented codes cannot be an answer."""

    def read(code: str) -> str:
        if is_leaf(code):
            return ""
        near = nearest_valid(code, 3)
        return f"code_not_valid: {code}" + (f"; nearest {' '.join(near)}" if near else "")

    return pd.Series(_each_distinct(read, rows["icd10"]), index=rows.index, dtype=object)


def text_without_answers(rows: pd.DataFrame) -> pd.Series:
    """A text that is nothing but the answer asks nothing.

    Fills the columns `diagnosis`, with the case's own answers taken out of it, and `stripped`, with
    the tasks whose answers were found.
    """
    results = _each_distinct(
        lambda *values: strip_answers(*values),
        *(rows[name] for name in ("diagnosis", "icd10", "regimen", "modality")),
    )
    rows["diagnosis"] = pd.Series([r.text for r in results], index=rows.index, dtype=object)
    rows["stripped"] = pd.Series([r.found for r in results], index=rows.index, dtype=object)
    return _reasons(rows, (_is_blank(rows["diagnosis"]), "diagnosis_is_its_answer"))


RULES: tuple[Rule, ...] = (
    patient_known,
    row_not_repeated,
    single_diagnosis,
    annotators_decision,
    plan_delivered,
    plan_not_boost,
    plan_not_replan,
    plan_not_palliative_of_several,
    one_primary_plan,
    diagnosis_present,
    modality_identifiable,
    regimen_complete,
    code_present,
    code_valid,
    text_without_answers,
)
# They tell plans apart; what annotators settled goes before them.
ABOUT_PLANS = (
    plan_delivered,
    plan_not_boost,
    plan_not_replan,
    plan_not_palliative_of_several,
    one_primary_plan,
)
# Reasons that someone who reads the record may resolve.
UNCERTAIN = (
    "only_qa_plan",  # a "TEST" plan may be that of a testis
    "only_boost_plan",
    "replan_of_superseded",
    "several_primary_plans",
    "several_palliative_plans",
    "modality_unknown",
    "modality_contradiction",
    "no_fractions",
    "no_target",
    "regimen_contradiction",
    "regimen_unreadable",
    "dose_implausible",
    "no_code",
    "code_not_valid",
    "code_contradiction",
)
# Without what these see to there is no case: a patient, a question and three answers.
INDISPENSABLE = (
    patient_known,
    diagnosis_present,
    modality_identifiable,
    regimen_complete,
    code_present,
    text_without_answers,
)


# ---------------------------------------------------------------------------------------------
# Rules of the user's own
# ---------------------------------------------------------------------------------------------


def check_skipped(names: Iterable[str]) -> tuple[str, ...]:
    """
    Raises:
      ValueError: a name is no rule, or a rule that no cohort can do without.
    """
    names = tuple(dict.fromkeys(name.strip() for name in names))
    optional = [rule.__name__ for rule in RULES if rule not in INDISPENSABLE]
    for name in names:
        if name in optional:
            continue
        known = name in [rule.__name__ for rule in RULES]
        problem = "cannot be turned off: no case is complete without it" if known else "is no rule"
        raise ValueError(f"--skip_rules={name}: {problem}; choose among {', '.join(optional)}")
    return names


def load_rules(path: str | Path) -> list[Rule]:
    """The rules of a Python file: its functions that take `rows`, in their order.

    A rule gets a copy of the rows that are left, every column text, `modality`, `regimen` and
    `icd10` in normal form, and returns a Series with the same index: True or a reason for rows that
    go, False or "" for those that stay.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it is no Python, has no rule, or one of a built-in rule's name.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a Python file with --rules")
    specification = importlib.util.spec_from_file_location("rules_of_the_user", path)
    if specification is None or specification.loader is None:
        raise ValueError(f"{path}: not a Python file; give one that ends in .py with --rules")
    module = importlib.util.module_from_spec(specification)
    try:
        specification.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"{path}{_line(path, error)}: {type(error).__name__}; correct it"
        ) from None
    rules = [
        value
        for name, value in vars(module).items()
        if inspect.isfunction(value)
        and value.__module__ == module.__name__
        and not name.startswith("_")
        and list(inspect.signature(value).parameters) == ["rows"]
    ]
    if not rules:
        raise ValueError(
            f"{path}: no rule in it; write functions `def my_rule(rows): ...` that return True or "
            "a reason for the rows to leave out"
        )
    for rule in rules:
        if rule.__name__ in [known.__name__ for known in RULES]:
            raise ValueError(f"{path}: {rule.__name__} is a built-in rule; rename yours")
    return rules


def _line(path: Path, error: BaseException) -> str:
    """ ", line 12": the last place in the user's file that the error came through."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f", line {error.lineno}"
    places = [
        p.lineno for p in traceback.extract_tb(error.__traceback__) if p.filename == str(path)
    ]
    return f", line {places[-1]}" if places else ""


def _apply_own(rule: Rule, rows: pd.DataFrame) -> pd.Series:
    path = Path(inspect.getfile(rule))
    try:
        given = rule(rows.drop(columns=[CASE, REPLACED], errors="ignore").copy())
    except Exception as error:  # its message may quote a record
        raise ValueError(
            f"{path}{_line(path, error)}: rule {rule.__name__} failed ({type(error).__name__})"
        ) from None
    if isinstance(given, pd.Series) and given.index.equals(rows.index) and not given.isna().any():
        if pd.api.types.is_bool_dtype(given):
            return _reasons(rows, (given.astype(bool), rule.__name__))
        if all(isinstance(reason, str) for reason in given):
            return given.astype(object)
    raise ValueError(
        f"{path}: rule {rule.__name__} must return a Series with the index of `rows`, True or a "
        'reason for rows that go, False or "" for those that stay'
    )


# ---------------------------------------------------------------------------------------------
# All of them
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """What one rule did.

    Attributes:
      rule: its name.
      cases: excluded patient cases by reason: those whose last row this rule took. None where the
        rule was turned off: how many it would have taken is not known.
      rows: excluded rows by reason, those of kept patients too; None as above.
    """

    rule: str
    cases: dict[str, int] | None = field(default_factory=dict)
    rows: dict[str, int] | None = field(default_factory=dict)


@dataclass(frozen=True)
class Selection:
    """
    Attributes:
      kept: rows that are left, one per patient unless `one_primary_plan` is turned off; `modality`,
        `regimen`, `icd10` and `diagnosis` as the cohort has them.
      excluded: columns row, reason, detail, patient_id (as it stands in the extract).
      cases: the reason of each excluded patient case, that of the rule that took its last row.
      steps: one for each rule, in order.
      assessed: number of patient cases.
      statuses: rows by plan status that no rule knows and that counts as treated, see
        `statuses_not_recognised`.
    """

    kept: pd.DataFrame
    excluded: pd.DataFrame
    cases: pd.Series
    steps: tuple[Step, ...]
    assessed: int
    statuses: dict[str, int]


def select(extract: pd.DataFrame, skip: Iterable[str] = (), own: Sequence[Rule] = ()) -> Selection:
    """Applies RULES in order, then the user's own.

    Args:
      extract: as `read_extract` gives it, index "row"; not changed.
      skip: names of rules to leave out.
      own: further rules, see `load_rules`.

    Raises:
      ValueError: as `check_skipped`, or a rule of the user's fails.
      AssertionError: rows or cases were lost or counted twice.
    """
    skip = check_skipped(skip)
    left = _tidy(extract)
    statuses = statuses_not_recognised(left)
    case_of_row = left[CASE].to_numpy()
    assessed = int(case_of_row.max(initial=-1)) + 1
    row_reasons = np.full(len(left), "", dtype=object)
    case_reasons = np.full(assessed, "", dtype=object)
    places = np.arange(len(left))  # of the rows that are left
    steps = []
    for rule in (*RULES, *own):
        if rule.__name__ in skip:
            steps.append(Step(rule.__name__, None, None))
            continue
        reasons = np.array([], dtype=object)
        if len(left):
            given = _apply_own(rule, left) if rule in own else rule(left)
            if rule in ABOUT_PLANS:
                given = given.where(~_settled(left), "")
            reasons = given.to_numpy(dtype=object)
        gone = reasons != ""
        row_reasons[places[gone]] = reasons[gone]
        short = np.array([reason.partition(": ")[0] for reason in reasons[gone]], dtype=object)
        survives = np.zeros(assessed, dtype=bool)
        survives[case_of_row[places[~gone]]] = True
        taken = case_of_row[places[gone]]
        last, first_row = np.unique(taken, return_index=True)
        fallen = ~survives[last]
        last, first_row = last[fallen], first_row[fallen]
        case_reasons[last] = short[first_row]
        steps.append(Step(rule.__name__, _counts(short[first_row]), _counts(short)))
        if gone.any():
            left, places = left[~gone], places[~gone]
    gone = row_reasons != ""
    pieces = [reason.partition(": ") for reason in row_reasons[gone]]
    excluded = pd.DataFrame(
        {
            "row": extract.index[gone].to_numpy(),
            "reason": np.array([piece[0] for piece in pieces], dtype=object),
            "detail": np.array([piece[2] for piece in pieces], dtype=object),
            "patient_id": extract["patient_id"].to_numpy()[gone],
        }
    )
    cases = pd.Series(case_reasons[case_reasons != ""], dtype=object, name="reason")
    assert len(extract) == len(left) + len(excluded), "rows were lost"
    assert assessed == left[CASE].nunique() + len(cases), "cases were lost"
    left = left.drop(columns=[CASE, REPLACED], errors="ignore")
    return Selection(left, excluded, cases, tuple(steps), assessed, statuses)


def statuses_not_recognised(rows: pd.DataFrame) -> dict[str, int]:
    """Rows by plan status that no rule knows, commonest first.

    A field may hold anything, so a status is named only where it is a word or two that at least
    LEAST_PATIENTS patients share; the rest are counted together as "(other)".
    """
    statuses = _words(rows, "plan_status").str.split().str.join(" ")
    known = "|".join((_CANCELLED, _NOT_COMPLETED, _SUPERSEDED, _TREATED))
    unknown = statuses[~statuses.isin(NO_TEXT) & ~statuses.str.contains(known)]
    patients = rows.loc[unknown.index, CASE].groupby(unknown).nunique()
    shared = patients.index[patients >= LEAST_PATIENTS]
    named = unknown.isin(shared) & unknown.str.fullmatch(r"[a-z]{2,16}(?:[ -][a-z]{2,16})?")
    return _counts(unknown.where(named, "(other)").to_numpy())


def _counts(reasons: np.ndarray) -> dict[str, int]:
    return {str(reason): int(n) for reason, n in pd.Series(reasons).value_counts().items()}


def _tidy(extract: pd.DataFrame) -> pd.DataFrame:
    """A copy with the columns that rules read trimmed, and CASE."""
    for name in (CASE, REPLACED, "stripped"):
        if name in extract.columns:
            raise ValueError(f"the extract has a column {name!r}, which rules use; rename it")
    trimmed = {}
    for name in extract.columns:
        if name in COLUMNS or name in ANNOTATED:
            values = extract[name].fillna("").astype("str").str.strip()
            if not values.equals(extract[name]):  # else a second copy would stay in memory
                trimmed[name] = values
    left = extract.assign(**trimmed)
    numbers, _ = pd.factorize(left["patient_id"])
    nameless = _is_blank(left["patient_id"]).to_numpy()
    numbers[nameless] = numbers.max(initial=0) + 1 + np.arange(nameless.sum())
    left[CASE] = pd.factorize(numbers)[0]
    return left
