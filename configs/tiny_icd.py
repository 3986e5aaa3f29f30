"""The demo's small model, the ICD-10-CM code.

python -m radonc_jax.train --config=configs/tiny_icd.py --workdir=demo/runs/icd

Hardware: two CPU cores. `launch/demo.sh` makes the base and the cohort first.
Time and result on two cores: about 4 minutes; accuracy 0.555 (ceiling 0.971, majority 0.118).
"""

from configs import tiny


def get_config():
    config = tiny.get_config()
    config.task = "icd"
    config.train.epochs = 4
    config.decode.max_new_tokens = 10
    return config
