"""Task `modality`: photon, proton, electron or brachytherapy, read from free text."""

import re

from radonc_jax.tasks.base import Record, Task, answer_section

MODALITIES = ("photon", "proton", "electron", "brachytherapy")

# Evidence that settles a modality wherever it stands.
_STRONG = {
    "photon": (
        r"\bphotons?\b|\bx-?\s?rays?\b|\bi-?mrt\b|\bvmat\b|\brapid\s?arc\b|\btomotherapy\b"
        r"|\bcyber\s?knife\b|\bgamma\s?knife\b|\bhyperarc\b|\b\d+\s?mv\b|\b(?:6|10|15|18)x\b"
    ),
    "proton": (
        r"\bprotons?\b|\bpbs\b|\bimpt\b|\bpencil[\s-]beam\b|\bpassive(?:ly)?[\s-]scatter"
        r"|\bspot[\s-]scanning\b|\bc?gy\s?\(?\s?rbe\b|\bcc?ge\b|\bgye\b"
    ),
    "electron": r"\belectrons?\b|(?<![\w-])e-(?!\w)|\bioert\b|\btse(?:b|bt|i|t)\b",
    "brachytherapy": (
        r"\bbrachy|\b[hlp]dr\b|\bseeds?\b|\b(?:i-?125|pd-?103|ir-?192|cs-?131|ru-?106)\b"
        r"|\bplaques?\b|\btandem\b|\bt&[or]\b|\bvcb\b|\bvaginal cylinder\b|\binterstitial\b"
        r"|\bintracavitary\b|\bendobronchial implant\b"
    ),
}
# Evidence that other modalities share (proton SBRT, 3D electrons, 230 MeV protons): it decides
# only where nothing strong does.
_WEAK = {
    "photon": (
        r"\b[23]-?d(?:[\s-]?c?rt)?\b|\bf?s[ab]?b?rt\b|\bf?srs\b|\bstereotactic\b|\b(?:ha-)?wbrt\b"
        r"|\btangents?\b|\bap/pa\b|\blinac\b"
    ),
    "electron": r"\bmev\b",
}
_OUTSIDE = re.compile(r"\bcarbon\b|\bneutrons?\b|\bhelium\b", re.IGNORECASE)
_STRONG_RE = {label: re.compile(pattern, re.IGNORECASE) for label, pattern in _STRONG.items()}
_WEAK_RE = {label: re.compile(pattern, re.IGNORECASE) for label, pattern in _WEAK.items()}


def normalise_modality(text: str) -> str | None:
    """The one modality that `text` names, or None.

    Names, techniques, isotopes and units count ("PBS" and "Gy(RBE)" are proton, "VMAT" photon,
    "HDR" brachytherapy). None when nothing is named, when two modalities are, or when the text
    names a beam outside the four (carbon ions, neutrons).
    """
    if _OUTSIDE.search(text):
        return None
    for evidence in (_STRONG_RE, _WEAK_RE):
        found = [label for label, pattern in evidence.items() if pattern.search(text)]
        if found:
            return found[0] if len(found) == 1 else None
    return None


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
