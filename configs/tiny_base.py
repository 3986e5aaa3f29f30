"""The demo's base model: all of a small Mistral trained on plain text, no questions or answers.

python -m radonc_jax.train --config=configs/tiny_base.py --workdir=demo/runs/base

Hardware: two CPU cores. `launch/demo.sh` runs it, then exports the result as an ordinary folder.
Time: about 3 minutes on two cores. Its validation loss is told in the terminal.
"""

from configs import tiny


def get_config():
    config = tiny.get_config()
    config.task = "text"
    config.model = "demo/start"
    config.trainable = "full"
    config.final_evaluation = False
    config.batch.over_length = "drop"
    config.batch.sequence_length = 128
    config.train.epochs = 3
    config.train.metric = "loss"
    config.optimizer.learning_rate = 3e-3
    config.optimizer.weight_decay = 0.1
    return config
