"""The demo's small model, the modality.

python -m radonc_jax.train --config=configs/tiny_modality.py --workdir=demo/runs/modality

Hardware: two CPU cores. `launch/demo.sh` makes the base and the cohort first.
Time and result on two cores: about 2 minutes; accuracy 0.761 (ceiling 0.876, majority 0.732).
"""

from configs import tiny


def get_config():
    config = tiny.get_config()
    config.task = "modality"
    config.decode.max_new_tokens = 8
    return config
