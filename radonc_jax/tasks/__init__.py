"""The tasks: cohort row -> prompt and answer, model output -> parsed answer. No jax in here."""

from radonc_jax.tasks.base import Record, Task, WithExamples, choose_examples
from radonc_jax.tasks.icd import IcdTask
from radonc_jax.tasks.modality import ModalityTask
from radonc_jax.tasks.regimen import RegimenTask
from radonc_jax.tasks.text import TextTask

TASKS: dict[str, Task] = {
    "regimen": RegimenTask(),
    "modality": ModalityTask(),
    "icd": IcdTask(),
}


def select(name: str) -> tuple[Task, ...] | tuple[TextTask]:
    """The tasks a config's `task` means: one by its name, "all" three, or "text" alone.

    Raises:
      ValueError: the name is none of these; the message lists them.
    """
    if name == "all":
        return tuple(TASKS.values())
    if name == TextTask.name:
        return (TextTask(),)
    if name in TASKS:
        return (TASKS[name],)
    raise ValueError(f"unknown task {name!r}; choose one of {', '.join([*TASKS, 'all', 'text'])}")


__all__ = [
    "TASKS",
    "Record",
    "Task",
    "TextTask",
    "WithExamples",
    "choose_examples",
    "select",
]
