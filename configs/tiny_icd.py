"""The demo's small model, the ICD-10-CM code.

python -m radonc_jax.train --config=configs/tiny_icd.py --workdir=demo/runs/icd

Hardware: two CPU cores. `launch/demo.sh` makes the base and the cohort first.
TIMERESULT
"""

from configs import tiny


def get_config():
    config = tiny.get_config()
    config.task = "icd"
    config.train.epochs = 4
    config.decode.max_new_tokens = 10
    return config
