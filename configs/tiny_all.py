"""The demo's small model, all three tasks with one adapter.

python -m radonc_jax.train --config=configs/tiny_all.py --workdir=demo/runs/all

Hardware: two CPU cores. `launch/demo.sh` makes the base and the cohort first.
Time and result: not measured; not part of the demo.
"""

from configs import tiny


def get_config():
    config = tiny.get_config()
    config.task = "all"
    config.decode.max_new_tokens = 48
    return config
