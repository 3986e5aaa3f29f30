"""A run folder: whose run it is, and what of its metrics survives a kill."""

import json
from types import SimpleNamespace

import pytest

from configs import tiny_icd
from radonc_jax import settings, tracking


def changed(value):
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    return value[:-1]


def keys(config, prefix=()):
    for name, value in config.items():
        if isinstance(value, dict):
            yield from keys(value, (*prefix, name))
        else:
            yield (*prefix, name)


def with_change(config, key):
    copy = json.loads(json.dumps(config))
    section = copy
    for name in key[:-1]:
        section = section[name]
    section[key[-1]] = changed(section[key[-1]])
    return copy


CONFIG = settings.from_mapping(tiny_icd.get_config().to_dict()).as_dict()
FREE = {"train.log_every", "train.recompute", "final_evaluation"}
FREE |= {"decode.batch", "decode.constrained"}
FREE_WITHOUT_DROPOUT = {
    "train.attention",
    "batch.microbatches",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_run_goes_on_only_with_settings_that_change_nothing_learned(tmp_path, dropout):
    config = CONFIG | {"lora": CONFIG["lora"] | {"dropout": dropout}}
    tracking.Run(tmp_path, config, main=True)
    tracking.check_folder(tmp_path, config)
    allowed = set()
    for key in keys(config):
        try:
            tracking.check_folder(tmp_path, with_change(config, key))
            allowed.add(".".join(key))
        except ValueError as error:
            assert repr(".".join(key)) in str(error)
    assert allowed == FREE | (set() if dropout else FREE_WITHOUT_DROPOUT)


def test_metrics_go_on_where_the_checkpoint_was(tmp_path):
    lines = [
        {"step": step, "split": split, "loss": 1.0 / step}
        for step in (1, 2, 3)
        for split in ("train", "validation")
    ]
    whole = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(whole + '{"step": 2, "spl')
    run = tracking.Run(tmp_path, CONFIG, main=True)
    run.start(2, 4)
    values = {"loss": 0.25, "tokens_per_second": 10.0}
    run.log(3, "train", values, show=False)  # every step stands in the file, shown or not
    run.log(4, "train", values, show=True)
    run.close()
    got = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    expected = [{"step": step, "split": "train", **values} for step in (3, 4)]
    assert got == lines[:4] + expected


def test_the_time_left_is_told_where_there_is_no_terminal(tmp_path, monkeypatch, capsys):
    """From the steps of this start alone: ten of them in half a minute, twenty to go."""
    now = 100.0
    monkeypatch.setattr(tracking, "time", SimpleNamespace(monotonic=lambda: now))
    run = tracking.Run(tmp_path, CONFIG, main=True)
    run.start(10, 40)
    now = 130.0
    run.log(20, "train", {"loss": 0.25, "tokens_per_second": 10.4}, show=True)
    run.close()
    assert "step 20/40: loss 0.2500, 10 tokens/s, 60 s left\n" in capsys.readouterr().out


def test_another_process_than_the_main_one_writes_nothing(tmp_path):
    run = tracking.Run(tmp_path / "run", CONFIG, main=False)
    run.write_manifest({})
    run.start(0, 1)
    run.log(1, "train", {"loss": 1.0}, show=True)
    run.advance()
    run.close()
    assert not (tmp_path / "run").exists()
