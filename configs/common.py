"""What all runs share; the other files in this folder state only what differs.

Only the abstract of Wang et al. 2025 (arXiv 2501.17286) is public: every number here is our own
choice. Keys are explained in the README and beside the dataclasses that read them.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Settings for a 7B model on one GPU of 80 GB or more, or a TPU slice."""
    config = ConfigDict()
    config.task = "icd"
    config.model = "mistralai/Mistral-7B-v0.1"
    config.cohort = "cohort"
    config.seed = 0
    config.trainable = "lora"
    config.final_evaluation = True

    config.lora = ConfigDict()
    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.lora.dropout = 0.0
    config.lora.targets = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    config.lora.rslora = False
    config.lora.dora = False
    config.lora.rank_pattern = ConfigDict()
    config.lora.alpha_pattern = ConfigDict()
    config.lora.init_from = ""

    config.precision = ConfigDict()
    config.precision.compute = "bfloat16"
    config.precision.base = "bfloat16"

    config.batch = ConfigDict()
    config.batch.examples = 32
    config.batch.microbatches = 1
    config.batch.sequence_length = 2048
    config.batch.packing = True
    config.batch.over_length = "fail"

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 2e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_fraction = 0.03
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = 1.0
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.loraplus_ratio = 1.0

    config.train = ConfigDict()
    config.train.epochs = 3
    config.train.steps = 0
    config.train.log_every = 10
    config.train.evaluate_every = 100
    config.train.save_every = 100
    config.train.patience = 0
    config.train.metric = "accuracy"
    config.train.validation_cases = 0
    config.train.attention = "auto"
    config.train.recompute = "nothing"

    config.mesh = ConfigDict()
    config.mesh.data = -1
    config.mesh.fsdp = 1
    config.mesh.tensor = 1

    config.decode = ConfigDict()
    config.decode.batch = 64
    config.decode.max_new_tokens = 96
    config.decode.constrained = ""
    return config
