"""Plain text for full-parameter training of a small base model.

A base model should know how diagnoses read and how codes are spelled and described, and nothing
of the tasks: there is no prompt, no question and no patient's answer in these documents.
"""

import functools
import itertools
import json
from collections.abc import Sequence
from importlib import resources

from radonc_jax.tasks.base import Record, tidy_diagnosis


@functools.cache
def code_descriptions() -> dict[str, str]:
    """ICD-10-CM code -> its official description, for the codes of the packaged site table."""
    source = resources.files("radonc_jax.data").joinpath("sites.json")
    return dict(json.loads(source.read_text(encoding="utf-8"))["icd_description"])


class TextTask:
    """Documents instead of prompts and answers: every token of them is trained."""

    name = "text"

    def documents(self, records: Sequence[Record], *, table: bool = True) -> list[str]:
        """One document per distinct diagnosis, then, with `table`, the public code table.

        The table is written as it is printed: each code before its description, each description
        alone, and the codes of each category in a row. The order is fixed; shuffling is the data
        loader's work.
        """
        documents = list(dict.fromkeys(tidy_diagnosis(record.diagnosis) for record in records))
        entries = sorted(code_descriptions().items()) if table else []
        for code, description in entries:
            documents += [f"{code} {description}", description]
        for category, codes in itertools.groupby(entries, key=lambda entry: entry[0][:3]):
            documents.append(f"{category}: " + ", ".join(code for code, _ in codes))
        return documents
