"""What each task asks beyond right and wrong: the `details` of an entry of report.json."""

from collections import Counter
from collections.abc import Mapping, Sequence

from radonc_jax.evaluation import codes, regimens
from radonc_jax.evaluation.metrics import UNPARSEABLE
from radonc_jax.evaluation.statistics import bootstrap_mean
from radonc_jax.tasks.modality import MODALITIES

_EXTERNAL = {"photon", "proton", "electron"}
MOST_COST = 3


def modality_cost(reference: str, answer: str | None) -> int:
    """What a wrong modality costs, on a scale of our own choice (no source weighs these errors).

    0 right; 1 unparseable (a person has to look) or photon for proton (both reach any depth; the
    plan is made anew); 2 electron for photon or proton or the reverse (another depth: target
    missed or what lies behind it treated); 3 external beam for brachytherapy or the reverse
    (another procedure altogether), MOST_COST.
    """
    if answer == reference:
        return 0
    if answer is None or answer == UNPARSEABLE:
        return 1
    if (reference in _EXTERNAL) != (answer in _EXTERNAL):
        return MOST_COST
    return 2 if "electron" in (reference, answer) else 1


def _modality(models: Mapping[str, Sequence[dict]], bootstrap: int, seed: int) -> dict:
    labels = [*MODALITIES, UNPARSEABLE]
    matrix = [[modality_cost(right, given) for given in labels] for right in MODALITIES]
    cost: dict = {"labels": labels, "matrix": matrix}
    for model, predictions in models.items():
        # As a share of the largest cost, so that equal costs have an interval as accuracy has.
        share = bootstrap_mean(
            [modality_cost(p["reference"], p["answer"]) / MOST_COST for p in predictions],
            [p["patient_id"] for p in predictions],
            resamples=bootstrap,
            seed=seed,
            share=True,
        )
        cost[model] = {
            name: None if value is None else MOST_COST * value for name, value in share.items()
        }
    return {"cost": cost}


def assess(
    task: str,
    models: Mapping[str, Sequence[dict]],
    *,
    sites: Mapping[str, str] | None = None,
    training_counts: Counter | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict:
    """`details` of one task: see `regimens.assess` and `codes.assess`; modality has {cost: {labels,
    matrix, model: {value, low, high}}}, the mean of `modality_cost` over the cases.

    Args:
      models: name -> predictions of the same cases in the same order.
      sites: case id -> site, where known.
      training_counts: cases of each ICD-10-CM code in the training split, where known.
    """
    if task == "regimen":
        return regimens.assess(models, sites, bootstrap=bootstrap, seed=seed)
    if task == "icd":
        return codes.assess(models, training_counts, bootstrap=bootstrap, seed=seed)
    return _modality(models, bootstrap, seed)
