"""A run's result in other programs' formats, read back by transformers and peft."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
from conftest import run_command
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from configs import tiny_icd
from radonc_jax import exporting, loading, settings, tracking
from radonc_jax.models import hub, lora
from radonc_jax.parallel import path_name
from radonc_jax.training.checkpoint import Checkpoints, Progress
from radonc_jax.training.step import TrainState
from tests import checkpoints, reports
from tests.test_huggingface import write_sentencepiece


def write_run(path, dtype=torch.float32, trainable="lora", dora=False):
    """A run folder with one checkpoint of random trained arrays; returns its logits."""
    checkpoints.write(path / "base", "mistral_window", dtype=dtype)
    write_sentencepiece(path / "base")
    mapping = tiny_icd.get_config()
    mapping.model = str(path / "base")
    mapping.trainable = trainable
    mapping.lora.rank, mapping.lora.alpha, mapping.lora.dora = 3, 5.0, dora
    mapping.lora.rank_pattern, mapping.lora.alpha_pattern = {"v_proj": 2}, {"down_proj": 9.0}
    run = settings.from_mapping(mapping.to_dict())
    (path / "run").mkdir()
    (path / "run" / "config.json").write_text(json.dumps(run.as_dict()))
    _, partition, weights = checkpoints.load(path / "base", run.adapter)
    if trainable == "lora":
        start, frozen = lora.init(partition.trainable, weights, seed=0), weights
    else:
        start, frozen = weights, partition.frozen
    rng = np.random.default_rng(0)
    trained = jax.tree.map(lambda x: x + 0.05 * jnp.asarray(rng.standard_normal(x.shape)), start)
    state = TrainState(jnp.int32(7), trained, optax.adam(0.1).init(trained))
    store = Checkpoints(path / "run")
    store.save(7, state, Progress())
    store.close()
    return checkpoints.logits(partition.merge(trained, frozen), checkpoints.tokens()), trained


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_for_peft(tmp_path, dora):
    expected, _ = write_run(tmp_path, dora=dora)
    exporting.export(tmp_path / "run", "peft", tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    model = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    logits = checkpoints.reference_logits(model, checkpoints.tokens())
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dora", [False, True])
def test_a_merged_model_for_transformers(tmp_path, dora):
    expected, _ = write_run(tmp_path, dora=dora)
    exporting.export(tmp_path / "run", "merged", tmp_path / "out", step="latest", check_cases=0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    logits = checkpoints.reference_logits(model.eval(), checkpoints.tokens())
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_merging_rounds_once_to_the_dtype_of_the_base(tmp_path):
    _, trained = write_run(tmp_path, dtype=torch.bfloat16)
    exporting.export(tmp_path / "run", "merged", tmp_path / "out", check_cases=0)
    base = load_file(tmp_path / "base" / hub.WEIGHTS)
    merged = load_file(tmp_path / "out" / hub.WEIGHTS)
    arrays = {path_name(p): np.asarray(x) for p, x in jax.tree_util.tree_leaves_with_path(trained)}
    assert set(base) == set(merged)
    lost = updates = 0.0
    for name, tensor in base.items():
        assert merged[name].dtype == tensor.dtype == jnp.bfloat16
        if "_proj" not in name:
            assert merged[name].tobytes() == tensor.tobytes(), name
            continue
        _, _, layer, parent, projection, _ = name.split(".")
        place = f"layers/{parent}/{projection}"
        a, b = (arrays[f"{place}/{kind}"][int(layer)].astype(np.float64) for kind in "ab")
        scale = {"v_proj": 5 / 2, "down_proj": 9 / 3}.get(projection, 5 / 3)
        exact = tensor.astype(np.float64) + scale * b @ a
        error = np.abs(merged[name].astype(np.float64) - exact)
        # Half a unit in the last of bfloat16's 8 bits, and float32's own rounding.
        assert (error <= np.abs(exact) * (2**-9 * 2 + 1e-6) + 1e-6).all(), name
        lost += np.sum(error**2)
        updates += np.sum((scale * b @ a) ** 2)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    rounding = json.loads((tmp_path / "out" / exporting.REPORT).read_text())["rounding"]
    assert rounding["share_of_update"] == pytest.approx(np.sqrt(lost / updates), rel=1e-3)
    assert set(rounding["by_projection"]) == set(lora.PROJECTIONS)


def test_an_adapter_names_its_base_and_revision(tmp_path):
    write_run(tmp_path)
    snapshot = tmp_path / "models--some--base" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    (tmp_path / "base").rename(snapshot)
    settings_file = tmp_path / "run" / "config.json"
    run = json.loads(settings_file.read_text()) | {"model": str(snapshot)}
    settings_file.write_text(json.dumps(run))
    (snapshot / "chat_template.jinja").write_text("{{ messages }}")
    exporting.export(tmp_path / "run", "peft", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["revision"] == "0" * 40
    assert written["base_model_name_or_path"] == str(snapshot)
    weights = tmp_path / "out" / "adapter_model.safetensors"
    assert weights.stat().st_mode == (tmp_path / "out" / "adapter_config.json").stat().st_mode
    exporting.export(tmp_path / "run", "merged", tmp_path / "merged", check_cases=0)
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_a_merged_export_without_its_cohort_says_what_to_do(tmp_path):
    write_run(tmp_path)
    with pytest.raises(ValueError, match="--check_cases=0 leaves the comparison out"):
        exporting.export(tmp_path / "run", "merged", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_run_folder_that_has_travelled(tmp_path):
    """Its base lies elsewhere here, and its cohort only in its own folder."""
    expected, _ = write_run(tmp_path)
    run, base = tmp_path / "run", tmp_path / "here"
    (tmp_path / "base").rename(base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 256}))
    reports.make_cohort(run / "cohort")
    (run / "cohort" / "excluded.csv").unlink()  # not needed, and older copies lack it
    for kind in ("peft", "merged"):
        with pytest.raises(FileNotFoundError, match=r"\(--base=/path/to/folder with"):
            exporting.export(run, kind, tmp_path / kind)
    with pytest.raises(FileNotFoundError, match=r"\(--base=/path/to/folder with"):
        loading.load_original(loading.read_settings(run), loading.default_mesh(), run)
    exporting.export(run, "peft", tmp_path / "peft", base=str(base))
    adapter = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(base)
    exporting.export(run, "merged", tmp_path / "merged", check_cases=2, base=str(base))
    report = json.loads((tmp_path / "merged" / exporting.REPORT).read_text())
    assert report["validation"]["cases"] == 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    logits = checkpoints.reference_logits(model.eval(), checkpoints.tokens())
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
    # Another base, or another cohort than the run's, is refused.
    here = tracking.base_sha256(base, True)
    of_run = here | {hub.WEIGHTS: "1f" * 32}
    manifest = {
        "base": {"model": "some/base", "revision": "2e" * 20, "sha256": of_run},
        "cohort": {"manifest_sha256": "0" * 64},
    }
    (run / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError) as error:
        exporting.export(run, "peft", tmp_path / "other", base=str(base))
    assert str(error.value) == (
        f"this is another base than {run} was trained on (by its manifest.json: "
        f"model.safetensors 1f1f1f1f, here {here[hub.WEIGHTS][:8]}). The base wanted is some/base, "
        "revision 2e2e2e2e: give the folder that holds it as --base"
    )
    manifest["base"]["sha256"] = {}
    (run / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"config.json not there, here \w{8}; .*; and 1 more\)"):
        exporting.export(run, "peft", tmp_path / "other", base=str(base))
    manifest["base"]["sha256"] = here
    (run / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"\(cohort differ.*--check_cases=0 leaves"):
        exporting.export(run, "merged", tmp_path / "other", base=str(base))


def test_the_command_is_quiet_about_devices_that_are_not_there(tmp_path):
    """jax tells, in a line of its log, that it looked for a TPU and found none."""
    write_run(tmp_path)
    flags = [f"--workdir={tmp_path / 'run'}", "--format=peft", f"--output={tmp_path / 'out'}"]
    done = run_command("export", *flags, JAX_PLATFORMS="")
    assert f"{tmp_path / 'out'}: peft of step 7" in done.stdout
    assert "Unable to initialize backend" not in done.stderr and "xla_bridge" not in done.stderr


def test_a_run_that_trained_everything(tmp_path):
    expected, _ = write_run(tmp_path, trainable="full")
    with pytest.raises(ValueError, match="--format=merged"):
        exporting.export(tmp_path / "run", "peft", tmp_path / "out")
    exporting.export(tmp_path / "run", "merged", tmp_path / "out", step=7)
    logits = checkpoints.logits(checkpoints.model(tmp_path / "out"), checkpoints.tokens())
    np.testing.assert_array_equal(logits, expected)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a run folder"):
        exporting.export(tmp_path, "peft", tmp_path / "out")
    write_run(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 8; it has \[7\]"):
        exporting.export(tmp_path / "run", "peft", tmp_path / "out", step=8)
    with pytest.raises(FileExistsError, match="choose another output"):
        exporting.export(tmp_path / "run", "peft", tmp_path / "run")
    assert not list(tmp_path.glob("out*"))
