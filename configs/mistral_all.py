"""Mistral-7B, all three tasks with one adapter.

python -m radonc_jax.train --config=configs/mistral_all.py --workdir=runs/mistral_all \\
    --config.cohort=cohort --config.model=/path/to/Mistral-7B

Hardware: the bfloat16 base takes 14.5 GB; one GPU of 80 GB or more, or a TPU slice (launch/).
Time and result: not measured on a real cohort; `report.html` of the run has both for yours.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.task = "all"
    config.model = "mistralai/Mistral-7B-v0.1"
    config.decode.max_new_tokens = 96
    return config
