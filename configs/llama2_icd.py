"""LLaMA2-7B, the ICD-10-CM code.

python -m radonc_jax.train --config=configs/llama2_icd.py --workdir=runs/llama2_icd \\
    --config.cohort=cohort --config.model=/path/to/LLaMA2-7B

Hardware: the bfloat16 base takes 13.5 GB; one GPU of 80 GB or more, or a TPU slice (launch/).
Time and result: not measured on a real cohort; `report.html` of the run has both for yours.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.task = "icd"
    config.model = "meta-llama/Llama-2-7b-hf"
    config.decode.max_new_tokens = 16
    return config
