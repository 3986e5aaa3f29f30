"""What the demo's runs on two CPU cores share."""

from configs import common


def get_config():
    config = common.get_config()
    config.model = "demo/base"
    config.cohort = "demo/cohort"
    config.lora.rank = 32
    config.lora.alpha = 64.0
    config.precision.compute = "float32"
    config.precision.base = "float32"
    config.batch.examples = 16
    config.batch.sequence_length = 128
    config.batch.over_length = "trim_diagnosis"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_fraction = 0.1
    config.train.epochs = 2
    config.train.evaluate_every = 0
    config.train.save_every = 100
    config.train.validation_cases = 128
    config.decode.batch = 64
    config.decode.constrained = "table"
    return config
