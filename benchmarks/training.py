"""Trains the same adapter here and with transformers + peft: useful tokens per second, memory.

    python benchmarks/training.py                 about 30 M parameters, float32, for a CPU
    python benchmarks/training.py --size=7b       Mistral-7B's shapes, bfloat16, for a GPU of 80 GB

Same random weights, same first adapter (rank 16 on all projections), same clinical lengths, same
examples in every step, same AdamW. Each way is a process of its own, and they take turns. Ways:

* radonc_jax           as `train` runs it: packed rows, answer positions only
* peft                 as people run it: padded to the longest, gradient checkpointing
* peft no recompute   the same without checkpointing
* peft packed         rows packed as here, isolated by positions and a block mask
* peft compiled       padded to a multiple of 64, without checkpointing, torch.compile

With 7b the ways of peft take a step in four parts, for memory; all but "peft" and "peft packed"
sort it by length before, which is more than their users do. On a GPU set
XLA_PYTHON_CLIENT_MEM_FRACTION=0.92.

A useful token is one of an example; padding does not count. Prints a table and writes JSON, and
fails if the ways' losses are not the same in every step, up to rounding.
"""

import functools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import app, flags

_SIZE = flags.DEFINE_enum("size", "30m", ["30m", "7b"], "Of the model.")
_STEPS = flags.DEFINE_integer("steps", 8, "Timed steps of each turn.", lower_bound=2)
_TURNS = flags.DEFINE_integer("turns", 3, "Turns of each way.", lower_bound=1)
_EXAMPLES = flags.DEFINE_integer("examples", None, "In a step; 16, or 64 for 7b.")
_WAYS = flags.DEFINE_list("ways", None, "Some of them only.")
_OUTPUT = flags.DEFINE_string(
    "output", None, "JSON to be written; benchmarks/results/training.json, or training_7b.json."
)
_SCRATCH = flags.DEFINE_string("scratch", None, "Folder for weights; a temporary one if absent.")
_ONE = flags.DEFINE_string("one", None, "Used by the benchmark itself: the way of a process.")

WAYS = ("radonc_jax", "peft", "peft no recompute", "peft packed", "peft compiled")
WARM_UP = 2
SIZES = {
    "30m": dict(
        vocab_size=8000,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
    ),
    "7b": dict(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
}
RANK, ALPHA, RATE = 16, 32, 2e-4
# Of a step of 7b, what fits an H200 together: without recomputing, some 8,000 tokens.
PARTS = {
    "30m": {},
    "7b": {"peft": 4, "peft no recompute": 4, "peft packed": 4, "peft compiled": 4},
}
LOSS_TOLERANCE = {"30m": 1e-5, "7b": 1e-2}  # relative: the rounding of float32 and of bfloat16


PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"


def main(argv):
    del argv
    if _ONE.value:
        folder = Path(_SCRATCH.value)
        run = train_here if _ONE.value == "radonc_jax" else train_peft
        print(json.dumps(run(_ONE.value, folder)))
        return
    check_device()
    os.environ[PREALLOCATE] = "false"  # the memory is for the ways, each in its process
    ways = _WAYS.value or WAYS
    results = {way: [] for way in ways}
    failures = {}
    with tempfile.TemporaryDirectory(dir=_SCRATCH.value) as scratch:
        subprocess.run([*this_command(scratch), "--one=prepare"], check=True, env=environment())
        for _ in range(_TURNS.value):
            for way in ways:
                if way not in failures:
                    found = subprocess.run(
                        [*this_command(scratch), f"--one={way}"],
                        env=environment(),
                        capture_output=True,
                        text=True,
                    )
                    if found.returncode:
                        told = found.stderr.strip().splitlines() or [f"exit {found.returncode}"]
                        failures[way] = told[-1][:300]
                    else:
                        results[way].append(json.loads(found.stdout.splitlines()[-1]))
                    different = report(
                        results, failures
                    )  # so far: nothing is lost if it is cut off
    if different:
        first = next(way for way, turns in results.items() if turns)
        sys.exit(f"error: other losses than those of {first}: {', '.join(different)}")
    if "radonc_jax" in failures:
        sys.exit(f"error: radonc_jax did not run: {failures['radonc_jax']}")


def this_command(scratch):
    flags_ = [f"--size={_SIZE.value}", f"--steps={_STEPS.value}", f"--scratch={scratch}"]
    flags_ += [f"--examples={examples_per_step()}"]
    return [sys.executable, __file__, *flags_]


def environment():
    kept = {name: value for name, value in os.environ.items() if name != PREALLOCATE}
    return kept | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def examples_per_step():
    return _EXAMPLES.value or (16 if _SIZE.value == "30m" else 64)


def check_device():
    if _SIZE.value != "7b":
        return
    import torch

    if not torch.cuda.is_available():
        sys.exit("error: --size=7b needs an NVIDIA GPU of 80 GB or more; there is none here")


def clinical_examples(count):
    """Random tokens of clinical lengths: prompts of 100 to 400 tokens, answers of 5 to 100."""
    from radonc_jax.data.batches import Example

    rng = np.random.default_rng(0)
    prompts = np.clip(rng.lognormal(np.log(215), 0.33, count), 100, 400).astype(int)
    answers = np.clip(rng.lognormal(np.log(21), 0.75, count), 5, 100).astype(int)
    vocabulary = SIZES[_SIZE.value]["vocab_size"]
    return [
        Example(
            f"case{n}",
            (1, *rng.integers(3, vocabulary, prompt - 1).tolist()),
            (*rng.integers(3, vocabulary, answer - 1).tolist(), 2),
        )
        for n, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]


@functools.cache
def batches(packed_for: str):
    """`packed_for`: "cudnn", to which long rows cost nothing, or "mask", a dense one."""
    from radonc_jax.data.batches import BatchConfig, Batches
    from radonc_jax.models.huggingface import read_config
    from radonc_jax.training import preflight

    count = examples_per_step()
    settings = BatchConfig(count, 1, 2048, True, "fail")
    architecture = read_config(Path(_SCRATCH.value) / "base")
    return Batches(
        clinical_examples(count * (WARM_UP + _STEPS.value)),
        settings,
        epochs=1,
        seed=0,
        **preflight.row_layout(
            architecture,
            "cpu" if _SIZE.value == "30m" else "gpu",
            1,
            "auto" if packed_for == "cudnn" else "xla",
            "float32" if _SIZE.value == "30m" else "bfloat16",
        ),
    )


def prepare(folder: Path):
    """Writes the base and the first adapter; B is not zero, so that both of its parts learn."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(**SIZES[_SIZE.value], sliding_window=None, max_position_embeddings=4096)
    small = _SIZE.value == "30m"
    with torch.device("cpu" if small else "cuda"):
        torch.set_default_dtype(torch.float32 if small else torch.bfloat16)
        model = MistralForCausalLM(config)
    model.save_pretrained(folder / "base")
    adapted = get_peft_model(
        model,
        LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.01)
    adapted.float().save_pretrained(folder / "adapter")


def measure(step, loss_of, useful):
    """Seconds of each timed step and all losses; `step(n)` starts one, `loss_of` waits for it."""
    losses, seconds = [], []
    for number in range(WARM_UP + _STEPS.value):
        began = time.perf_counter()
        losses.append(loss_of(step(number)))
        if number >= WARM_UP:
            seconds.append(time.perf_counter() - began)
    rates = [useful(number + WARM_UP) / s for number, s in enumerate(seconds)]
    return {"tokens_per_second": rates, "losses": losses}


def train_here(way, folder):
    import jax
    import jax.numpy as jnp

    from radonc_jax import loading, parallel
    from radonc_jax.models import huggingface, lora
    from radonc_jax.models.decoder import PROJECTIONS
    from radonc_jax.training import meters, preflight, step
    from radonc_jax.training.optimizer import OptimizerConfig, make_optimizer

    data = batches("cudnn")
    architecture = huggingface.read_config(folder / "base")
    mesh = parallel.make_mesh(parallel.MeshConfig(1, 1, 1), jax.devices()[:1])
    name = "float32" if _SIZE.value == "30m" else "bfloat16"
    dtype = huggingface.as_dtype(name)
    config = lora.LoRAConfig(RANK, float(ALPHA), 0.0, tuple(PROJECTIONS), False, False)
    execution, why = preflight.choose_execution(
        "auto", "nothing", architecture, dtype, dtype, config, None, [data], mesh
    )
    partition = lora.partition(architecture, config, dtype, execution=execution)
    base = loading.load_base(folder / "base", architecture, partition, name, mesh)
    adapter = loading.find_adapter(folder / "adapter", architecture.num_layers)
    trainable = adapter.load(partition, mesh)
    optimizer = make_optimizer(OptimizerConfig(RATE, "constant", 0.0, 0.0, 1.0, 0.9, 0.999), 100)
    _, placements = step.state_shardings(partition, optimizer, mesh)
    state = step.TrainState(jnp.int32(0), trainable, optimizer.init(trainable))
    state = jax.device_put(state, placements)
    run = step.jit_train_step(partition, optimizer, 0, mesh)

    def one(number):
        nonlocal state
        placed = parallel.put(data[number], mesh, None, parallel.BATCH_AXES)
        state, metrics = run(state, base, placed)
        return metrics

    with jax.set_mesh(mesh):
        found = measure(one, lambda metrics: float(metrics["loss"]), data.useful_tokens)
    median = statistics.median(found["tokens_per_second"])
    per_token = meters.flops_per_token(architecture, full=False)
    return found | {
        "peak_bytes": meters.peak_memory_bytes(),
        "device": mesh.devices.flat[0].device_kind,
        "attention": f"{execution.attention.backend} ({why})",
        "unrolled": execution.unrolled,
        "rows": [data.rows, data.row_length, data.fill],
        "mfu": meters.mfu(median, per_token, list(mesh.devices.flat)),
        "model_gflops_per_second": median * per_token / 1e9,
    }


def train_peft(way, folder):
    if way == "prepare":
        prepare(folder)
        return {}
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    data = batches("mask")
    device = "cpu" if _SIZE.value == "30m" else "cuda"
    dtype = torch.float32 if _SIZE.value == "30m" else torch.bfloat16
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype).to(device)
    model = PeftModel.from_pretrained(
        base, folder / "adapter", is_trainable=True, autocast_adapter_dtype=True
    )
    model.config.use_cache = False
    if way == "peft":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.999), weight_decay=0.0)
    forward = torch.compile(model, dynamic=True) if way == "peft compiled" else model

    parts = PARTS[_SIZE.value].get(way, 1)

    def inputs(number):
        """Of each part of a step: model inputs, labels [rows, T] (-100 where no answer is)."""
        if way == "peft packed":
            step = {name: torch.from_numpy(x[0]) for name, x in data[number].items()}
            count = min(parts, len(step["tokens"]))
            for batch in zip(*(x.tensor_split(count) for x in step.values()), strict=True):
                yield packed(dict(zip(step, batch, strict=True)))
            return
        chosen = set(data.case_ids(number))
        examples = [e for e in data.examples if e.case_id in chosen]
        if way != "peft":  # people take them as they come
            examples.sort(key=lambda example: example.length)
        for part in np.array_split(np.arange(len(examples)), min(parts, len(examples))):
            yield padded([examples[i] for i in part])

    def packed(batch):
        labels = torch.full(batch["tokens"].shape, -100)
        real = batch["weights"] > 0
        rows = torch.nonzero(real)[:, 0]
        labels[rows, batch["answer_index"][real].long()] = batch["targets"][real].long()
        segments, length = batch["segment_ids"], batch["tokens"].shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        mask = causal & (segments[:, :, None] == segments[:, None, :])
        return dict(
            input_ids=batch["tokens"].long(),
            position_ids=batch["positions"].long(),
            attention_mask=mask[:, None],
        ), labels

    def padded(examples):
        longest = max(example.length for example in examples)
        if way == "peft compiled":
            longest = -(-longest // 64) * 64
        tokens = torch.zeros(len(examples), longest, dtype=torch.long)
        labels, mask = torch.full_like(tokens, -100), torch.zeros_like(tokens)
        for row, example in enumerate(examples):
            all_tokens = torch.tensor([*example.prompt, *example.answer])
            tokens[row, : example.length] = all_tokens[:-1]
            mask[row, : example.length] = 1
            labels[row, len(example.prompt) - 1 : example.length] = all_tokens[
                len(example.prompt) :
            ]
        return dict(input_ids=tokens, attention_mask=mask), labels

    def one(number):
        made = list(inputs(number))
        answer_tokens = sum(int((labels >= 0).sum()) for _, labels in made)
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for given, labels in made:
            given = {name: x.to(device) for name, x in given.items()}
            logits = forward(**given).logits.float()
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1),
                labels.to(device).flatten(),
                ignore_index=-100,
                reduction="sum",
            )
            loss = loss / answer_tokens
            loss.backward()
            total = total + loss.detach()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return total

    found = measure(one, lambda loss: loss.item(), data.useful_tokens)
    if device == "cuda":
        peak, name = torch.cuda.max_memory_allocated(), torch.cuda.get_device_name()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        name = f"cpu, {torch.get_num_threads()} threads"
    return found | {"peak_bytes": peak, "device": name, "torch": torch.__version__}


def differing_losses(results, tolerance) -> list[str]:
    """Ways of which some loss is not that of the first way in the same step."""
    runs = [(way, run["losses"]) for way, turns in results.items() for run in turns]
    expected = runs[0][1] if runs else []
    ways = [
        way
        for way, losses in runs
        if len(losses) != len(expected) or not np.allclose(losses, expected, tolerance, 0)
    ]
    return list(dict.fromkeys(ways))


def report(results, failures) -> list[str]:
    """Prints the table and writes the JSON; the ways whose losses are others."""
    from radonc_jax import tracking

    table = {}
    for way, runs in results.items():
        if runs:
            rates = [rate for run in runs for rate in run["tokens_per_second"]]
            table[way] = {
                "tokens_per_second": statistics.median(rates),
                "peak_gib": statistics.median(run["peak_bytes"] for run in runs) / 2**30,
                "last_loss": runs[0]["losses"][-1],
            }
    peft = {way: row["tokens_per_second"] for way, row in table.items() if way != "radonc_jax"}
    print(f"{'':22}{'useful tokens/s':>16}{'peak GiB':>10}{'last loss':>11}{'ours over it':>14}")
    ours = table.get("radonc_jax", {}).get("tokens_per_second")
    for way, row in table.items():
        ratio = f"{ours / row['tokens_per_second']:.2f}" if ours else ""
        print(
            f"{way:22}{row['tokens_per_second']:16.0f}{row['peak_gib']:10.2f}"
            f"{row['last_loss']:11.4f}{ratio:>14}"
        )
    for way, failure in failures.items():
        print(f"{way}: failed: {failure}")
    if ours and peft:
        best = max(peft, key=peft.get)
        table["best_of_peft"] = best
        print(f"best form of peft: {best}, of which we are {ours / peft[best]:.2f} times")
    content = {
        "size": _SIZE.value,
        "examples_per_step": examples_per_step(),
        "table": table,
        "runs": results,
        "failures": failures,
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "environment": tracking.environment(),
    }
    name = "training.json" if _SIZE.value == "30m" else f"training_{_SIZE.value}.json"
    output = Path(_OUTPUT.value or Path("benchmarks", "results", name))
    output.parent.mkdir(parents=True, exist_ok=True)
    different = differing_losses(results, LOSS_TOLERANCE[_SIZE.value])
    content["differing_losses"] = different
    tracking.write_json(output, content)
    return different


if __name__ == "__main__":
    app.run(main)
