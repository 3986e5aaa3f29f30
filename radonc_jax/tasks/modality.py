"""Task `modality`: photon, proton, electron or brachytherapy, read from free text."""

import functools
import re
from dataclasses import dataclass

from radonc_jax.tasks.base import Record, Task, answer_section

MODALITIES = ("photon", "proton", "electron", "brachytherapy")

# Evidence that settles a modality wherever it stands.
_STRONG = {
    "photon": (
        r"\bphotons?\b|\bx-?\s?rays?\b|\bi-?mrt\b|\bvmat\b|\brapid\s?arc\b|\btomotherapy\b"
        r"|\bcyber\s?knife\b|\bgamma\s?knife\b|\bhyperarc\b|\bhalcyon\b|\bco(?:balt)?-?60\b"
        r"|\b\d+\s?mv\b|\b(?:4|6|10|15|18)x(?:[\s-]?fff)?\b"
    ),
    "proton": (
        r"\bprotons?\b|\bpbs\b|\bimpt\b|\bpencil[\s-]beam\b|\bpassive(?:ly)?[\s-]scatter"
        r"|\bspot[\s-]scanning\b|\bc?gy\s?\(?\s?rbe\b|\bcc?ge\b|\bgye\b"
    ),
    "electron": r"\belectrons?\b|(?<![\w-])e-(?!\w)|\bioert\b|\btse(?:b|bt|i|t)\b",
    "brachytherapy": (
        r"\bbrachy|\b[hlp]dr\b|\bseeds?\b|\b(?:i|pd|ir|cs|ru)-?\s?(?:125|103|192|131|106)\b"
        r"|\b(?:125-?i|103-?pd|192-?ir|iodine-?125|palladium-?103|iridium-?192)\b"
        r"|\bplaques?\b|\btandem\b|\bt&[or]\b|\bvcb\b|\bvaginal cylinder\b|\binterstitial\b"
        r"|\bintracavitary\b|\bendobronchial implant\b"
    ),
}
# Evidence that several modalities share: what it means where nothing strong stands, and which
# strong evidence it goes with. mCODE's value sets of technique and modality, and what is done.
_SHARED = (
    (r"\bf?s[ab]?b?rt\b|\bf?srs\b|\bstereotactic\b", "photon", ("proton",)),
    (r"\b[23]-?d(?:[\s-]?c?rt)?\b", "photon", ("proton", "electron", "brachytherapy")),
    (r"\btangents?\b|\bap/pa\b|\b(?:ha-)?wbrt\b", "photon", ("proton", "electron")),
    (r"\blinac\b", "photon", ("electron",)),
)
_MEV = re.compile(r"\b(\d+(?:\.\d+)?)?\s?mev\b", re.IGNORECASE)
_ELECTRON_MEV = 25  # clinical electron beams end below, proton beams begin above
_OUTSIDE = re.compile(r"\bcarbon\b|\bneutrons?\b|\bhelium\b", re.IGNORECASE)
_STRONG_RE = {label: re.compile(pattern, re.IGNORECASE) for label, pattern in _STRONG.items()}
_SHARED_RE = tuple(
    (re.compile(pattern, re.IGNORECASE), label, others) for pattern, label, others in _SHARED
)
# One letter says something only where it is all that a field holds, or beside an energy.
_FIELD_CODES = (
    (re.compile(r"x|ph|phot|x0?\d{1,2}", re.IGNORECASE), "photon"),
    (re.compile(r"p|pr|pt|prot", re.IGNORECASE), "proton"),
    (re.compile(r"e|el|elec|\d{1,2}\s?e|e\d{1,2}", re.IGNORECASE), "electron"),
    (re.compile(r"b|br|bt", re.IGNORECASE), "brachytherapy"),
)
# What is ruled out or past is not how this plan is given.
_NOT_THIS = re.compile(
    r"\b(?:no|not|without|declined|declines|refused|instead of|prior|previous)\s(?:\w+\s){0,2}$",
    re.IGNORECASE,
)
_BOOST = re.compile(r"\bboost\b|\bcone-?\s?down\b", re.IGNORECASE)
_SEGMENT = re.compile(r"[;+\n]|,(?!\d)|\bthen\b|\bfollowed by\b", re.IGNORECASE)


@dataclass(frozen=True)
class Identified:
    """What the parts of a record say of the modality.

    `label` is one of MODALITIES or None; then `reason` is "unidentifiable" (nothing names one),
    "contradiction" (two are named) or "outside" (a beam that is none of the four), else "".
    `evidence` holds (part, label, words), `words` being what matched of this module's vocabulary
    and so no clinical text.
    """

    label: str | None
    reason: str
    evidence: tuple[tuple[str, str, str], ...]

    def explain(self) -> str:
        """ "field: electron (Electron); energy: photon (6 MV)", each finding once."""
        return "; ".join(
            f"{part}: {label} ({words})" for part, label, words in dict.fromkeys(self.evidence)
        )


def _matches(pattern: re.Pattern, text: str):
    # The words before a match, not the whole text again: notes may be long.
    return (
        match
        for match in pattern.finditer(text)
        if not _NOT_THIS.search(text, max(0, match.start() - 60), match.start())
    )


def _without_boost(text: str) -> str:
    """The text less its boost's segments, unless the boost is all there is."""
    if not _BOOST.search(text):
        return text
    segments = _SEGMENT.split(text)
    kept, boost = [], False
    for segment in segments:
        # What follows a boost's dose belongs to it: "boost 10 Gy in 5, electrons".
        boost = boost or _BOOST.search(segment) is not None
        if not boost:
            kept.append(segment)
    return " , ".join(kept) if any(map(str.strip, kept)) else text


@functools.lru_cache(maxsize=65536)
def identify_modality(
    field: str = "", technique: str = "", energy: str = "", text: str = ""
) -> Identified:
    """The one modality that a plan's parts name together, or why there is none.

    Names, techniques, energies, isotopes and units count: PBS, IMPT and Gy(RBE) are protons, 6 MV,
    10X and VMAT photons, 9 MeV electrons, HDR, LDR and I-125 brachytherapy. What several
    modalities share (SBRT, 3D, tangents) decides where nothing else does, and contradicts where it
    cannot be ("SBRT, electrons"). In `field` and `energy` a letter alone counts too (X, E, P,
    "6E"). A boost in `text` is another plan; what is ruled out ("not protons") or past is none.
    """
    parts = {"field": field, "technique": technique, "energy": energy, "text": text}
    strong: list[tuple[str, str, str]] = []
    shared: list[tuple[str, str, str]] = []
    energies: list[tuple[str, str, str]] = []
    allowed: list[tuple[str, ...]] = []
    for part, said in parts.items():
        said = said.strip()
        if not said:
            continue
        if part == "text":
            said = _without_boost(said)
        if (outside := next(_matches(_OUTSIDE, said), None)) is not None:
            return Identified(None, "outside", ((part, "outside", outside[0]),))
        for label, pattern in _STRONG_RE.items():
            strong += [(part, label, match[0]) for match in _matches(pattern, said)]
        for pattern, label, others in _SHARED_RE:
            for match in _matches(pattern, said):
                shared.append((part, label, match[0]))
                allowed.append((label, *others))
        for match in _matches(_MEV, said):
            proton = match[1] is not None and float(match[1]) > _ELECTRON_MEV
            energies.append((part, "proton" if proton else "electron", match[0].strip()))
        if part in ("field", "energy"):
            strong += [
                (part, label, said) for pattern, label in _FIELD_CODES if pattern.fullmatch(said)
            ]
    # An energy in a column of its own is a fact; in running text "6 MeV" may be a slip for 6 MV.
    strong += [found for found in energies if found[0] == "energy"]
    evidence = tuple(strong + shared + energies)
    labels = {label for _, label, _ in strong} or {label for _, label, _ in energies}
    if labels:
        if len(labels) == 1 and all(labels <= set(names) for names in allowed):
            return Identified(labels.pop(), "", evidence)
        return Identified(None, "contradiction", evidence)
    if shared:
        return Identified(shared[0][1], "", evidence)
    return Identified(None, "unidentifiable", ())


def normalise_modality(text: str) -> str | None:
    """The one modality that `text` names, or None: `identify_modality` of a text alone.

    None when nothing is named, when two modalities are, or when the text names a beam outside the
    four (carbon ions, neutrons).
    """
    return identify_modality(text=text).label


class ModalityTask(Task):
    name = "modality"
    instruction = "Name the modality for this diagnosis: photon, proton, electron or brachytherapy."
    labels = MODALITIES

    def reference(self, record: Record) -> str:
        label = normalise_modality(record.modality)
        if label is None:
            raise ValueError(
                f"case {record.case_id}: column modality names none of {', '.join(MODALITIES)}; "
                "prepare the cohort again or correct that row"
            )
        return label

    def parse(self, output: str) -> str | None:
        return normalise_modality(answer_section(output))
