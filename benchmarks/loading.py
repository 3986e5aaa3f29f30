"""Loads a sharded checkpoint here and with transformers: time, and host memory beside the weights.

    python benchmarks/loading.py                    4 GiB of random bfloat16 weights
    python benchmarks/loading.py --gigabytes=14     where there is room for it

Each load is a process of its own; the loaders take turns. The files are in the page cache for all.
transformers may leave weights in the mapped file and read them at their first use, so every weight
is read once before the clock stops, on both sides. Before each load as much memory is touched and
given back: a virtual machine may have to get it from its host first, which takes ten times as long
as filling it. Prints a table and writes JSON.
"""

import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from absl import app, flags
from safetensors.numpy import save_file

_GIGABYTES = flags.DEFINE_float("gigabytes", 4.0, "GiB of weights, at least.")
_RUNS = flags.DEFINE_integer("runs", 3, "Loads of each kind.", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", "benchmarks/results/loading.json", "JSON to be written.")
_SCRATCH = flags.DEFINE_string(
    "scratch", None, "Folder for the weights; a temporary one if absent."
)
_ONE = flags.DEFINE_string("one", None, "Used by the benchmark itself: the loader of a process.")

LOADERS = ("radonc_jax bfloat16", "transformers bfloat16", "radonc_jax int8", "radonc_jax nf4")
HIDDEN, MLP, HEADS, KV_HEADS, VOCABULARY = 4096, 14336, 32, 8, 32000  # Mistral-7B, fewer layers


def main(argv):
    del argv
    if _ONE.value:
        print(json.dumps(load(_ONE.value, Path(_SCRATCH.value))))
        return
    with tempfile.TemporaryDirectory(dir=_SCRATCH.value) as scratch:
        size = write_checkpoint(Path(scratch), _GIGABYTES.value * 2**30)
        runs = {loader: [] for loader in LOADERS}
        for number in range(_RUNS.value + 1):
            for loader in LOADERS:
                touch_memory(size * 3 // 2)
                measured = in_own_process(loader, scratch)
                if number:  # the first round only warms the page cache
                    runs[loader].append(measured)
    table = {
        loader: {key: statistics.median(run[key] for run in measured) for key in measured[0]}
        for loader, measured in runs.items()
    }
    print(f"{size / 2**30:.2f} GiB in bfloat16, several files; medians of {_RUNS.value} loads")
    print(f"{'':24}{'seconds':>9}{'weights GiB':>13}{'beside them GiB':>17}")
    for loader, row in table.items():
        weights, beside = row["weights_bytes"] / 2**30, row["beside_bytes"] / 2**30
        print(f"{loader:24}{row['seconds']:9.2f}{weights:13.2f}{beside:17.2f}")
    from radonc_jax import tracking

    result = {
        "checkpoint_bytes": size,
        "runs": runs,
        "medians": table,
        "machine": platform.platform(),
        "environment": tracking.environment(),
    }
    tracking.write_json(Path(_OUTPUT.value), result)


def write_checkpoint(folder: Path, at_least: float) -> int:
    """A Mistral of as many layers as it takes, in files of about 1 GiB; returns its bytes."""
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    shapes["lm_head.weight"] = (VOCABULARY, HIDDEN)
    kv = HIDDEN * KV_HEADS // HEADS
    layers, size = 0, sum(2 * int(np.prod(shape)) for shape in shapes.values())
    while size < at_least:
        layer = {
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.k_proj": (kv, HIDDEN),
            "self_attn.v_proj": (kv, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (MLP, HIDDEN),
            "mlp.up_proj": (MLP, HIDDEN),
            "mlp.down_proj": (HIDDEN, MLP),
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
        }
        shapes |= {f"model.layers.{layers}.{k}.weight": shape for k, shape in layer.items()}
        size += sum(2 * int(np.prod(shape)) for shape in layer.values())
        layers += 1
    pool = np.random.default_rng(0).standard_normal(2**26, np.float32) * 0.02
    pool = pool.astype(ml_dtypes.bfloat16)
    files, weight_map, held = [{}], {}, 0
    for number, (name, shape) in enumerate(shapes.items()):
        if held > 2**30:
            files.append({})
            held = 0
        count = int(np.prod(shape))
        files[-1][name] = np.resize(np.roll(pool[: min(count, pool.size)], number), shape)
        held += 2 * count
    for number, tensors in enumerate(files, start=1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return size


def touch_memory(size: int) -> None:
    """Takes memory from the host, in a process of its own, which gives it back to this system."""
    program = f"import numpy; numpy.empty({size}, numpy.uint8)[::4096] = 0"
    subprocess.run([sys.executable, "-c", program], check=True)


def in_own_process(loader: str, scratch: str) -> dict:
    command = [sys.executable, __file__, f"--one={loader}", f"--scratch={scratch}"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"error: {loader}: {result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def memory(kind: str) -> int:
    """Bytes of this process now (VmRSS) or at most (VmHWM), from Linux."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {kind}")


def load(loader: str, folder: Path) -> dict:
    """Loads once; returns seconds, bytes of the weights, and peak memory beside them."""
    package, kind = loader.split()
    run = load_with_transformers if package == "transformers" else load_here
    before, seconds, weights = run(folder, kind)
    return {
        "seconds": seconds,
        "weights_bytes": weights,
        "beside_bytes": max(memory("VmHWM") - before - weights, 0),
    }


def load_here(folder: Path, kind: str):
    import jax
    import jax.numpy as jnp

    from radonc_jax import loading
    from radonc_jax.models import huggingface, lora

    mesh = loading.default_mesh()
    jnp.zeros(1).block_until_ready()
    before, start = memory("VmRSS"), time.perf_counter()
    config = huggingface.read_config(folder)
    quantized = kind if kind in ("int8", "nf4") else None
    partition = lora.partition(config, None, jnp.bfloat16, quantized)
    weights = loading.load_base(folder, config, partition, "bfloat16", mesh)
    leaves = jax.block_until_ready(jax.tree.leaves(weights))
    for leaf in leaves:
        np.asarray(leaf).view(np.uint8).max()  # the host's own view: nothing is copied
    return before, time.perf_counter() - start, sum(leaf.nbytes for leaf in leaves)


def load_with_transformers(folder: Path, kind: str):
    import torch
    from transformers import AutoModelForCausalLM

    torch.zeros(1)
    before, start = memory("VmRSS"), time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, kind))
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.detach().view(torch.uint8).numpy().max()
    size = sum(parameter.nbytes for parameter in parameters)
    return before, time.perf_counter() - start, size


if __name__ == "__main__":
    app.run(main)
