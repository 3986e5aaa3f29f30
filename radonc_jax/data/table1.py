"""Table 1: who is in each split, how far the splits differ, and what is to be predicted.

Differences are standardised mean differences, which do not depend on the number of cases (0.1 is
the customary bound): for numbers (m1 - m2) / sqrt((s1^2 + s2^2) / 2), for categories the
generalisation of Yang and Dalton (SAS Global Forum 2012, paper 335). P values are those of the
chi-square test and of Kruskal and Wallis over the three splits; with many characteristics some are
small by chance.
"""

import html
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from radonc_jax.data.splits import SPLITS
from radonc_jax.tasks import TASKS, Record
from radonc_jax.tasks.icd import description

SHOWN_LEVELS = 12  # of a characteristic; the rest are one line
RARE = 10  # a label with fewer training cases is hardly learnt
SMALL_CELL = 11  # counts below this are not published (convention of the US CMS)
NOT_STATED = "not stated"
GROUPS = ("overall", *SPLITS)
COLUMNS = (
    "section", "characteristic", "level", *GROUPS, "smd_validation", "smd_test", "p_value",
    "p_test",
)  # fmt: skip

_GROUP = r"(IV|I{1,3}|[0-4])\s?(?:[A-E]\d?)?"
_STAGE = rf"\b(?:stage|figo|ann\s+arbor)\s*:?\s*(?:group\s+)?{_GROUP}\b(?![-./]\d)"
_STAGE_ALONE = rf"^\s*(?:stage)?\s*{_GROUP}\s*$"
_ROMAN = {"1": "I", "2": "II", "3": "III", "4": "IV"}


@dataclass(frozen=True)
class Table1:
    """
    Attributes:
      rows: the table, COLUMNS, every cell a text.
      facts: what the manifest tells: largest differences, rare labels, majority baseline.
      published: whether counts below SMALL_CELL are left out.
    """

    rows: pd.DataFrame
    facts: dict
    published: bool

    @property
    def csv(self) -> str:
        return self.rows.to_csv(index=False, lineterminator="\n")

    @property
    def html(self) -> str:
        return _page(self.rows, self.published)


def table1(cases: pd.DataFrame, published: bool = False) -> Table1:
    """
    Args:
      cases: cohort rows with a column split; site, stage, sex, age and institution where known.
      published: join levels until no split has between 1 and 10 cases in a line, and give no such
        count elsewhere. The facts, for the manifest, hold them still.
    """
    split = pd.Categorical(cases["split"], categories=SPLITS)
    sizes = _per_group(pd.Series(1, index=cases.index), split, len)
    rows = [_row("cases", "cases", "", {name: f"{sizes[name]:,}" for name in GROUPS})]
    patients = _per_group(cases["patient_id"], split, pd.Series.nunique)
    rows.append(_row("cases", "patients", "", _single(patients, published)))
    differences = {}
    for name, values in characteristics(cases).items():
        describe = _numbers if values.dtype.kind == "f" else _categories
        lines, smd = describe(name, values, split, sizes, published)
        rows += lines
        differences[name] = smd
    label_rows, rare = _labels(cases, split, published)
    majority_rows, majority = _majority(cases, split, sizes, published)
    facts = {
        "largest_difference": {
            other: _largest({name: smd[other] for name, smd in differences.items()})
            for other in SPLITS[1:]
        },
        "rare_labels": rare,
        "majority_baseline": majority,
    }
    rows += [*label_rows, *majority_rows, *_codes(cases, split, sizes, published)]
    table = pd.DataFrame(rows, columns=list(COLUMNS)).fillna("")
    return Table1(table, facts, published)


def characteristics(cases: pd.DataFrame) -> dict[str, pd.Series]:
    """Of each case: categories as text ("" where unknown), numbers as float (NaN where unknown)."""
    found = {}
    for name in ("institution", "site"):
        if name in cases.columns:
            found[name] = _texts(cases[name])
    found["stage group"] = stage_groups(cases)
    found["modality"] = cases["modality"]
    found["code category"] = cases["icd10"].str[:3]
    found["words of the diagnosis"] = cases["diagnosis"].str.split().str.len().astype(float)
    if "age" in cases.columns:
        found["age"] = pd.to_numeric(_texts(cases["age"]), errors="coerce").astype(float)
    if "sex" in cases.columns:
        found["sex"] = _texts(cases["sex"]).str.capitalize()
    return found


def _texts(values: pd.Series) -> pd.Series:
    return values.fillna("").astype(str).str.strip()


def stage_groups(cases: pd.DataFrame) -> pd.Series:
    """0, I, II, III or IV, from the column `stage`, else as the diagnosis text states it; "" where
    neither does (TNM alone is not translated: that takes site and edition)."""
    group = cases["diagnosis"].str.extract(f"(?i){_STAGE}", expand=False)
    if "stage" in cases.columns:
        column = _texts(cases["stage"])
        alone = column.str.extract(f"(?i){_STAGE_ALONE}", expand=False)
        group = alone.fillna(column.str.extract(f"(?i){_STAGE}", expand=False)).fillna(group)
    return group.str.upper().replace(_ROMAN).fillna("")


# ---------------------------------------------------------------------------------------------
# Lines of the table
# ---------------------------------------------------------------------------------------------


def _per_group(values: pd.Series, split: pd.Categorical, count: Callable) -> dict[str, int]:
    each = {name: int(count(values[split == name])) for name in SPLITS}
    return {"overall": int(count(values)), **each}


def _row(section: str, characteristic: str, level: str, cells: dict[str, str], **more) -> dict:
    return {"section": section, "characteristic": characteristic, "level": level, **cells, **more}


def _single(counts: dict[str, int], published: bool, sizes: dict[str, int] | None = None) -> dict:
    """Cells of a line that stands alone; with `sizes` shares of them."""
    cells = {name: _share(n, sizes[name]) if sizes else f"{n:,}" for name, n in counts.items()}
    small = [name for name, n in counts.items() if published and 0 < n < SMALL_CELL]
    if small:  # nor may the overall number give it away
        cells |= {"overall": ""} | dict.fromkeys(small, f"<{SMALL_CELL}")
    return cells


def _share(count: int, of: int) -> str:
    return f"{count:,} ({100 * count / of:.1f}%)" if of else "0"


def _number(value: float | None, digits: int = 3) -> str:
    if value is None or not np.isfinite(value):
        return ""
    return f"<{10**-digits}" if 0 < value < 10**-digits else f"{value:.{digits}f}"


def _categories(name, values, split, sizes, published):
    counts = _joined_levels(_counted(values.replace("", NOT_STATED), split), published)
    smd = {other: _categorical_smd(counts["train"], counts[other]) for other in SPLITS[1:]}
    p = _chi_square(counts)
    tests = {
        **{f"smd_{other}": _number(value) for other, value in smd.items()},
        "p_value": _number(p),
        "p_test": "chi-square" if p is not None else "",
    }
    lines = [_row("characteristics", name, "", dict.fromkeys(GROUPS, ""), **tests)]
    for level, row in counts.iterrows():
        said = _described(level) if name == "code category" else level
        lines.append(_row("characteristics", name, said, _cells(row, sizes)))
    return lines, smd


def _counted(values: pd.Series, split: pd.Categorical) -> pd.DataFrame:
    """Cases of each level in each split."""
    table = pd.crosstab(values.to_numpy(), np.asarray(split), dropna=False)
    return table.reindex(columns=list(SPLITS), fill_value=0)


def _cells(counts: pd.Series, sizes: dict[str, int]) -> dict[str, str]:
    cells = {part: _share(int(counts[part]), sizes[part]) for part in SPLITS}
    return {"overall": _share(int(counts.sum()), sizes["overall"])} | cells


def _described(code: str) -> str:
    return f"{code} {description(code)}".strip()


def _joined_levels(
    counts: pd.DataFrame, published: bool, limit: int | None = SHOWN_LEVELS
) -> pd.DataFrame:
    """The commonest levels, the others in one line "n other levels"."""
    limit = limit or len(counts)
    order = sorted(counts.index, key=lambda level: (-counts.loc[level].sum(), str(level)))
    shown = len(order) if len(order) <= limit + 1 else limit

    def small(rows: pd.DataFrame) -> bool:
        cells = rows.to_numpy()
        return published and bool(((cells > 0) & (cells < SMALL_CELL)).any())

    while shown and small(counts.loc[order[:shown]]):
        shown -= 1
    # What is joined must be large enough too, or it could be found by subtraction.
    while shown and small(counts.loc[order[shown:]].sum().to_frame()):
        shown -= 1
    table = counts.loc[order[:shown]]
    if shown < len(order):
        other = counts.loc[order[shown:]].sum().rename(f"{len(order) - shown} other levels")
        table = pd.concat([table, other.to_frame().T])
    return table


def _numbers(name, values, split, sizes, published):
    parts = {part: values[split == part].dropna().to_numpy() for part in SPLITS}
    smd = {other: _numeric_smd(parts["train"], parts[other]) for other in SPLITS[1:]}
    p = None
    if all(map(len, parts.values())) and values.nunique() > 1:
        p = float(stats.kruskal(*parts.values()).pvalue)
    cells = {}
    for group, known in {"overall": values.dropna().to_numpy(), **parts}.items():
        if len(known):
            low, middle, high = np.percentile(known, [25, 50, 75])
            cells[group] = f"{middle:g} [{low:g}, {high:g}]"
    tests = {
        **{f"smd_{other}": _number(value) for other, value in smd.items()},
        "p_value": _number(p),
        "p_test": "Kruskal-Wallis" if p is not None else "",
    }
    lines = [_row("characteristics", name, "median [quartiles]", cells, **tests)]
    missing = _per_group(values.isna(), split, np.sum)
    if missing["overall"]:
        lines.append(_row("characteristics", name, NOT_STATED, _single(missing, published)))
    return lines, smd


def _labels(cases, split, published):
    lines, facts = [], {}
    for title, column in (("modality", "modality"), ("icd", "icd10"), ("regimen", "regimen")):
        training = cases.loc[split == "train", column].value_counts()
        own = cases[column].map(training).fillna(0)
        unseen, rare = own == 0, own < RARE
        distinct = _per_group(cases[column], split, pd.Series.nunique)
        with_rare = _per_group(cases.loc[rare, column], split[rare.to_numpy()], len)
        with_unseen = _per_group(cases.loc[unseen, column], split[unseen.to_numpy()], len)
        few = f"cases whose label has fewer than {RARE} training cases"
        cells = {group: f"{distinct[group]:,}" for group in GROUPS}
        lines.append(_row("labels", title, "distinct labels", cells))
        for level, counts in (
            (few, with_rare),
            ("cases whose label is not in train", with_unseen),
        ):
            lines.append(_row("labels", title, level, _single(counts, published)))
        facts[title] = {
            "labels": distinct["overall"],
            "rare_labels": int((training < RARE).sum()) + int(cases.loc[unseen, column].nunique()),
            "cases": {name: with_rare[name] for name in SPLITS},
        }
    return lines, facts


def _codes(cases, split, sizes, published):
    counts = _joined_levels(_counted(cases["icd10"], split), published, limit=None)
    return [
        _row("codes", "icd", _described(code), _cells(row, sizes))
        for code, row in counts.iterrows()
    ]


def _majority(cases, split, sizes, published):
    """The commonest training answer of each task, given to every case."""
    lines, facts = [], {}
    for task in TASKS.values():
        reference = _references(task, cases)
        counts = reference[split == "train"].value_counts()
        # Equal counts are settled by spelling, as `evaluation.baselines` does.
        answer = min(counts.index, key=lambda text: (-counts[text], text))
        right = reference.map({text: task.correct(answer, text) for text in reference.unique()})
        hits = _per_group(right, split, np.sum)
        cells = _single(hits, published, sizes)
        lines.append(_row("majority baseline", task.name, f"always {answer!r}", cells))
        shares = {name: hits[name] / sizes[name] if sizes[name] else None for name in SPLITS}
        facts[task.name] = {"answer": answer, "accuracy": shares}
    return lines, facts


def _references(task, cases: pd.DataFrame) -> pd.Series:
    """Of each case; every distinct label is read once."""
    column = {"icd": "icd10"}.get(task.name, task.name)
    empty = dict.fromkeys(
        ("case_id", "patient_id", "diagnosis", "regimen", "modality", "icd10"), ""
    )
    known = {
        label: task.reference(Record(**(empty | {column: label})))
        for label in cases[column].unique()
    }
    return cases[column].map(known)


# ---------------------------------------------------------------------------------------------
# Differences
# ---------------------------------------------------------------------------------------------


def _numeric_smd(one: np.ndarray, other: np.ndarray) -> float | None:
    if min(len(one), len(other)) < 2:
        return None
    spread = np.sqrt((one.var(ddof=1) + other.var(ddof=1)) / 2)
    difference = abs(one.mean() - other.mean())
    return float(difference / spread) if spread else (0.0 if difference == 0 else None)


def _categorical_smd(one: pd.Series, other: pd.Series) -> float | None:
    if not one.sum() or not other.sum():
        return None
    p, q = (counts.to_numpy(float)[1:] / counts.sum() for counts in (one, other))
    covariance = (np.diag(p + q) - np.outer(p, p) - np.outer(q, q)) / 2
    return float(np.sqrt(max((p - q) @ np.linalg.pinv(covariance) @ (p - q), 0.0)))


def _chi_square(counts: pd.DataFrame) -> float | None:
    """P value, levels of expected counts below 5 taken together; None where nothing differs."""
    table = counts.loc[:, counts.sum() > 0].to_numpy(float)
    if table.shape[1] < 2:
        return None
    smallest = table.sum(axis=1) * table.sum(axis=0).min() / table.sum()
    rare = table[smallest < 5].sum(axis=0, keepdims=True)
    table = np.concatenate([table[smallest >= 5], rare[rare.sum(axis=1) > 0]])
    return float(stats.chi2_contingency(table).pvalue) if len(table) > 1 else None


def _largest(differences: dict[str, float | None]) -> dict | None:
    known = {name: value for name, value in differences.items() if value is not None}
    if not known:
        return None
    name = max(known, key=known.get)
    return {"characteristic": name, "smd": round(known[name], 4)}


# ---------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------

_STYLE = (
    "body{font:14px/1.45 system-ui,sans-serif;margin:2em auto;max-width:76em;padding:0 1em}"
    "table{border-collapse:collapse}td,th{padding:.2em .7em;text-align:right;vertical-align:top}"
    "td:first-child,th:first-child{text-align:left}thead th{border-bottom:2px solid #333}"
    "tr.s th{border-top:1px solid #999;padding-top:.8em}td.l{padding-left:2em!important}"
    "p{max-width:60em;color:#333}"
)
_HEADS = {
    "smd_validation": "SMD train / validation",
    "smd_test": "SMD train / test",
    "p_value": "p",
}


def _page(rows: pd.DataFrame, published: bool) -> str:
    escape = html.escape
    columns = [*GROUPS, "smd_validation", "smd_test", "p_value"]
    head = "".join(f"<th>{_HEADS.get(name, name)}</th>" for name in columns)
    body, section, shown = [], None, None
    codes = rows[rows["section"] == "codes"]
    for row in rows[rows["section"] != "codes"].to_dict("records"):
        if row["section"] != section:
            section = row["section"]
            body.append(
                f'<tr class="s"><th colspan="{len(columns) + 1}">{escape(section)}</th></tr>'
            )
        name, level = row["characteristic"], row["level"]
        cells = "".join(f"<td>{escape(row[column])}</td>" for column in columns)
        if level and (name == shown or section != "characteristics"):
            prefix = "" if section == "characteristics" else f"{name}: "
            body.append(f'<tr><td class="l">{escape(prefix + level)}</td>{cells}</tr>')
        else:
            said = f"{name}, {level}" if level else name
            body.append(f"<tr><td>{escape(said)}</td>{cells}</tr>")
        shown = name
    notes = (
        "SMD: standardised mean difference, for categories that of Yang and Dalton; above 0.1 the "
        "splits differ by more than is usual. p: chi-square test (levels of expected counts below "
        "5 taken together) or Kruskal-Wallis test over the three splits, not corrected for their "
        "number. Stage groups are those that a column or the text states. The majority baseline "
        "gives every case the commonest training answer."
    )
    if published:
        notes += (
            f" Levels are joined so that no line has 1 to {SMALL_CELL - 1} cases in a split; other "
            f"counts below {SMALL_CELL} are not given."
        )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Table 1</title>'
        f"<style>{_STYLE}</style></head><body><h1>Table 1: characteristics of the splits</h1>"
        f"<table><thead><tr><th></th>{head}</tr></thead><tbody>\n"
        + "\n".join(body)
        + f"\n</tbody></table><p>{escape(notes)}</p>"
        + f"<details><summary>All codes ({len(codes)} lines)</summary><table>"
        + "\n".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>"
            for line in codes[["level", *GROUPS]].itertuples(index=False, name=None)
        )
        + "</table></details></body></html>\n"
    )
