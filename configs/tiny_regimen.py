"""The demo's small model, the treatment regimen, free text.

python -m radonc_jax.train --config=configs/tiny_regimen.py --workdir=demo/runs/regimen

Hardware: two CPU cores. `launch/demo.sh` makes the base and the cohort first.
Time and result on two cores: about 3 minutes; accuracy 0.130, ROUGE-1 0.638 (ceiling 0.707).
"""

from configs import tiny


def get_config():
    config = tiny.get_config()
    config.task = "regimen"
    config.decode.max_new_tokens = 48
    return config
