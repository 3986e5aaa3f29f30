"""Cases per second of greedy decoding: this project against transformers, in turn.

    python benchmarks/decoding.py                  about 30 million random weights, any machine
    python benchmarks/decoding.py --size=7b        Mistral-7B shapes in bfloat16, on a GPU

Every way is a process of its own; they take turns. All get the same prompts (an instruction that
all share, then texts of different lengths), the same stop rule and, with 30m, the same weights, so
that tokens are compared as well. transformers gets its prompts sorted by length, which is more than
its users do. With 7b weights are drawn on the device, each way its own: speed alone is compared.
What does not work where it is run is told as such. Prints a table and writes JSON.

A floor is the least time that the device could take, its share what that is of the time taken:

* flop        products of tokens with weights (in a prompt's last layer only keys and values, but
              at its end; the head where a token is chosen), at the rate of one large product
* bandwidth   in each decode step all weights once, and what each live row's cache holds by then,
              at the rate of adding one to 1 GiB in place, which is read and written
* both        prefill by flop, then decode by the slower of products and weights, then the cache

Each way measures both rates itself after its run, the best of twelve. Steps are those that our
scheduler counts, and those of the longest answer of each batch of `generate`; generate_batch does
not tell its own, so it has a share by flop only.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import app, flags

_SIZE = flags.DEFINE_enum("size", "30m", ["30m", "7b"], "Model.")
_CASES = flags.DEFINE_integer("cases", 192, "Prompts; 1581 with --size=7b.", lower_bound=2)
_TURNS = flags.DEFINE_integer("turns", 2, "Timed runs of each way.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", 32, "Our slots; 256 with --size=7b.", lower_bound=1)
_WAYS = flags.DEFINE_list("ways", None, "Only these; all when left out.")
_OUTPUT = flags.DEFINE_string(
    "output", None, "JSON to write; benchmarks/results/decoding.json, or decoding_7b.json."
)
_WAY = flags.DEFINE_string("way", None, "Set by the benchmark itself, for a process of its own.")
_FOLDER = flags.DEFINE_string("folder", None, "As --way.")

SIZES = {
    "30m": dict(vocab_size=8000, num_hidden_layers=8, hidden_size=512, num_attention_heads=8,
                num_key_value_heads=2, intermediate_size=1536),
    "7b": dict(vocab_size=32000, num_hidden_layers=32, hidden_size=4096, num_attention_heads=32,
               num_key_value_heads=8, intermediate_size=14336),
}  # fmt: skip
MEDIAN, SHARED, NEW = 250, 130, 64  # tokens of a prompt, of its instruction, and of an answer
WAYS = ("ours", "ours without shared prefix", "generate 1", "generate 32", "generate 128",
        "generate 32 static cache", "generate_batch", "ours bfloat16")  # fmt: skip
# Cases of what would take minutes.
FEW = {
    "30m": {"generate 1": 8, "ours bfloat16": 24},
    "7b": {"generate 1": 8, "generate 32": 256, "generate 128": 512, "generate_batch": 512,
           "generate 32 static cache": 64},
}  # fmt: skip
REPEATS = 12  # of a measured rate
SHARES = ("share_of_flop_floor", "share_of_bandwidth_floor", "share_of_floor")


PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"


def main(argv):
    del argv
    if _WAY.value is not None:
        run_way(_WAY.value, Path(_FOLDER.value))
        return
    os.environ[PREALLOCATE] = "false"  # the memory is for the ways, each in its process
    kept = {name: value for name, value in os.environ.items() if name != PREALLOCATE}
    if _SIZE.value == "7b":
        import jax

        if jax.devices()[0].platform != "gpu":
            sys.exit(
                "error: --size=7b measures a GPU of 80 GB or more, and JAX finds none here; "
                "run the same command there"
            )
    results: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder))
        ways = _WAYS.value or WAYS
        for turn in range(_TURNS.value):
            for way in ways:
                once = way in FEW[_SIZE.value] or way not in (
                    "ours",
                    "generate 32",
                    "ours without shared prefix",
                )
                if turn and once:
                    continue
                command = [sys.executable, __file__, f"--way={way}", f"--folder={folder}"]
                command += [f"--{flag.name}={flag.value}" for flag in (_SIZE, _CASES, _BATCH)]
                done = subprocess.run(command, capture_output=True, text=True, env=kept)
                lines = done.stdout.splitlines()
                result = (
                    json.loads(lines[-1])
                    if done.returncode == 0 and lines
                    else {"failed": (done.stderr.strip().splitlines() or ["?"])[-1][:200]}
                )
                results.setdefault(way, []).append(result)
                short = {k: v for k, v in result.items() if k not in ("tokens", "gaps")}
                print(way, json.dumps(short), flush=True)
                write_report(results)  # so far: nothing is lost if it is cut off
    print_table(summarise(results)["ways"])


def write_report(results) -> None:
    from radonc_jax import tracking

    report = summarise(results)
    report |= {"size": _SIZE.value, "cases": cases(), "slots": slots()}
    report |= {"prompt_tokens_median": MEDIAN, "shared": SHARED, "longest_answer": NEW}
    report |= {"machine": platform.platform(), "cores": os.cpu_count()}
    report |= {"environment": tracking.environment()}
    name = "decoding.json" if _SIZE.value == "30m" else f"decoding_{_SIZE.value}.json"
    output = Path(_OUTPUT.value or Path("benchmarks", "results", name))
    output.parent.mkdir(parents=True, exist_ok=True)
    tracking.write_json(output, report)


def cases() -> int:
    return 1581 if _SIZE.value == "7b" else _CASES.value


def slots() -> int:
    return 256 if _SIZE.value == "7b" else _BATCH.value


def write_inputs(folder: Path) -> None:
    rng = np.random.default_rng(0)
    vocabulary = SIZES[_SIZE.value]["vocab_size"]
    shared = rng.integers(3, vocabulary, SHARED).tolist()
    rest = rng.lognormal(np.log(MEDIAN - SHARED), 0.4, cases()).clip(20, 500).astype(int)
    prompts = [shared + rng.integers(3, vocabulary, length).tolist() for length in rest]
    # Any of these ids ends an answer: a random model then stops after some 28 tokens.
    stops = [2, *rng.choice(np.arange(3, vocabulary), vocabulary // 28, replace=False).tolist()]
    (folder / "prompts.json").write_text(
        json.dumps({"prompts": prompts, "shared": shared, "stops": stops})
    )
    if _SIZE.value == "30m":
        import torch
        import transformers

        torch.manual_seed(0)
        model = transformers.MistralForCausalLM(hf_config())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(2.5)  # answers that vary
        model.save_pretrained(folder / "model")


def hf_config():
    import transformers

    return transformers.MistralConfig(
        **SIZES[_SIZE.value], max_position_embeddings=4096, sliding_window=None, rope_theta=1e4,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def run_way(way: str, folder: Path) -> None:
    """Runs one way and prints its figures as the last line."""
    given = json.loads((folder / "prompts.json").read_text())
    given["prompts"] = given["prompts"][: FEW[_SIZE.value].get(way)]
    result = (ours if way.startswith("ours") else theirs)(way, folder, **given)
    seconds = result["seconds"]
    count = len(given["prompts"])
    result |= {
        "cases": count,
        "cases_per_second": count / seconds,
        "output_tokens_per_second": sum(map(len, result["tokens"])) / seconds,
    }
    for name, floor in floors(given["prompts"], result).items():
        result[f"share_of_{name}"] = floor / seconds
    print(json.dumps(result))


def floors(prompts, result) -> dict[str, float]:
    """The least seconds of a run by what bounds it, as described at the top.

    Args:
      prompts: token ids.
      result: of the run: `tokens` of the answers, `decode_steps` (None where they are not known),
        `spared` prompt tokens (the instruction's, but once), `weight_bytes` of one weight, and the
        measured `flops_per_second` and `bytes_per_second`.
    """
    size = SIZES[_SIZE.value]
    hidden, heads = size["hidden_size"], size["num_attention_heads"]
    kv = 2 * size["num_key_value_heads"] * hidden // heads
    layer = 2 * hidden * hidden + hidden * kv + 3 * hidden * size["intermediate_size"]
    layers = size["num_hidden_layers"]
    weights = layers * layer + size["vocab_size"] * hidden
    before_end = (layers - 1) * layer + hidden * kv

    before = sum(map(len, prompts)) - len(prompts) - result["spared"]
    prefill = 2 * (before * before_end + len(prompts) * weights) / result["flops_per_second"]
    steps = [steps_of(answer) for answer in result["tokens"]]
    decode = 2 * sum(steps) * weights / result["flops_per_second"]
    found = {"flop_floor": prefill + decode}
    if result["decode_steps"] is not None:
        pace = result["weight_bytes"] / result["bytes_per_second"]
        read = result["decode_steps"] * weights * pace
        held = sum(n * len(p) + n * (n + 1) // 2 for p, n in zip(prompts, steps, strict=True))
        cache = held * layers * kv * pace
        found |= {"bandwidth_floor": read + cache, "floor": prefill + max(decode, read) + cache}
    return found


def steps_of(answer) -> int:
    """Decode steps of an answer with its stop token: the prefill chooses the first of these."""
    return min(len(answer), NEW - 1)


def least_seconds(run) -> float:
    """Of several calls; `run` waits for its end."""
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def ours(way, folder, prompts, shared, stops):
    import jax
    import jax.numpy as jnp

    from radonc_jax import loading, parallel
    from radonc_jax.models import huggingface, lora

    small = _SIZE.value == "30m"
    dtype = jnp.bfloat16 if "bfloat16" in way or not small else jnp.float32
    mesh = loading.default_mesh()
    if small:
        config = huggingface.read_config(folder / "model")
        partition = lora.partition(config, None, dtype)
        weights = loading.load_base(folder / "model", config, partition, str(dtype.dtype), mesh)
    else:
        path = folder / "config"
        hf_config().save_pretrained(path)
        config = huggingface.read_config(path)
        partition = lora.partition(config, None, dtype)
        placements = parallel.shardings(partition.trainable, mesh)

        def draw():
            leaves, structure = jax.tree.flatten(partition.trainable)
            keys = jax.random.split(jax.random.key(0), len(leaves))
            drawn = [
                (0.05 * jax.random.normal(key, leaf.shape, dtype)).astype(dtype)
                for key, leaf in zip(keys, leaves, strict=True)
            ]
            return structure.unflatten(drawn)

        weights = jax.jit(draw, out_shardings=placements)()

    def scheduler(batch):
        return loading.make_scheduler(partition, mesh, config, tuple(stops), batch, NEW)

    prefix = () if "without shared" in way else shared
    decode = scheduler(slots())

    def run(decode):
        return decode(weights, partition.frozen, prompts, prefix=prefix)

    cold = time.perf_counter()
    run(decode)
    cold = time.perf_counter() - cold
    before = decode.steps
    start = time.perf_counter()
    answers = run(decode)
    seconds = time.perf_counter() - start
    result = {
        "seconds": seconds,
        "first_run_seconds": cold,
        "tokens": [answer.tokens for answer in answers],
        "decode_steps": decode.steps - before,
        "spared": (len(prompts) - 1) * len(prefix),
        "padding": padding(decode, prompts, prefix),
        "device": jax.devices()[0].device_kind,
    }
    result |= rates(dtype)
    if "bfloat16" in way:
        other = run(scheduler(8))
        result["other_batch_differs"] = [
            one.tokens != two.tokens for one, two in zip(answers, other, strict=True)
        ]
        result["gaps"] = [answer.gap for answer in answers]
    return result


def padding(decode, prompts, prefix) -> float:
    """Tokens that the prefills run over those that were asked for."""
    groups = decode._groups(prompts, prefix)
    asked = sum(len(p) for p in prompts) - sum(len(g) * len(prefix) * s for g, s, *_ in groups)
    return sum(rows * width for _, _, rows, width in groups) / asked - 1


def rates(dtype) -> dict:
    """What is to be had here: FLOP/s of a large product of the model's shapes, and bytes/s."""
    import jax
    import jax.numpy as jnp

    size = SIZES[_SIZE.value]
    shapes = (2048, size["hidden_size"]), (size["hidden_size"], size["intermediate_size"])
    # Random: a product of ones takes less current, so that a GPU runs it faster.
    x, w = (jax.random.normal(jax.random.key(0), shape, dtype) for shape in shapes)
    multiply = jax.jit(lambda x, w: jnp.dot(x, w, precision="highest"))
    product = least_seconds(lambda: multiply(x, w).block_until_ready())
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    stream = jnp.zeros(2**28, jnp.float32)

    def one():
        nonlocal stream
        stream = add(stream).block_until_ready()

    return {
        "flops_per_second": 2 * x.size * w.shape[1] / product,
        "bytes_per_second": 2 * stream.nbytes / least_seconds(one),
        "weight_bytes": dtype.dtype.itemsize,
    }


def theirs(way, folder, prompts, shared, stops):
    del shared
    import torch
    import transformers

    small = _SIZE.value == "30m"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if small:
        model = transformers.MistralForCausalLM.from_pretrained(folder / "model")
    else:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(device):
            model = transformers.MistralForCausalLM(hf_config())
    model = model.to(device).eval()
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    answers: list = [None] * len(prompts)
    options = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=stops, pad_token_id=0)

    def synchronise():
        if device == "cuda":
            torch.cuda.synchronize()

    def cut(tokens):
        for place, token in enumerate(tokens):
            if token in ends:
                return tokens[:place]
        return tokens

    ends = set(stops)

    def generate(batch, chosen, **more):
        for start in range(0, len(chosen), batch):
            rows = chosen[start : start + batch]
            width = max(len(prompts[i]) for i in rows)
            tokens = torch.zeros((len(rows), width), dtype=torch.long)
            mask = torch.zeros_like(tokens)
            for row, i in enumerate(rows):
                tokens[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[row, width - len(prompts[i]) :] = 1
            with torch.no_grad():
                output = model.generate(
                    tokens.to(device), attention_mask=mask.to(device), **options, **more
                )
            for row, i in enumerate(rows):
                answers[i] = cut(output[row, width:].tolist())

    if way == "generate_batch":
        settings = transformers.GenerationConfig(**options)

        def run(chosen):
            outputs = model.generate_batch(
                inputs=[prompts[i] for i in chosen], generation_config=settings, progress_bar=False
            )
            if len(outputs) != len(chosen):
                raise RuntimeError(f"{len(outputs)} answers to {len(chosen)} prompts")
            numbered = sorted(outputs.items(), key=lambda item: int(item[0].split("_")[-1]))
            for i, (_, output) in zip(chosen, numbered, strict=True):
                answers[i] = cut(list(output.generated_tokens))
    else:
        batch = int(way.split()[1])
        more = {"cache_implementation": "static"} if "static" in way else {}

        def run(chosen):
            generate(batch, chosen, **more)

    run(order[-4:])  # the shortest: what is set up at first use is not timed
    synchronise()
    start = time.perf_counter()
    run(order)
    synchronise()
    seconds = time.perf_counter() - start
    if way == "generate_batch":
        steps = None
    else:
        batches = [order[place : place + batch] for place in range(0, len(order), batch)]
        steps = sum(max(steps_of(answers[i]) for i in rows) for rows in batches)
    hidden, wide = model.config.hidden_size, model.config.intermediate_size
    x = torch.randn(2048, hidden, device=device, dtype=model.dtype)
    w = torch.randn(hidden, wide, device=device, dtype=model.dtype)
    stream = torch.zeros(2**28, device=device, dtype=torch.float32)

    def multiply():
        torch.matmul(x, w)
        synchronise()

    def add():
        stream.add_(1)
        synchronise()

    return {
        "seconds": seconds,
        "tokens": answers,
        "decode_steps": steps,
        "spared": 0,
        "flops_per_second": 2 * x.numel() * wide / least_seconds(multiply),
        "bytes_per_second": 2 * stream.nbytes / least_seconds(add),
        "weight_bytes": model.dtype.itemsize,
        "device": device,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def summarise(results: dict[str, list[dict]]) -> dict:
    reference = next((r["tokens"] for r in results.get("generate 32", []) if "tokens" in r), None)
    ways = {}
    for way, turns in results.items():
        good = [turn for turn in turns if "failed" not in turn]
        if not good:
            ways[way] = {"failed": turns[0]["failed"]}
            continue
        names = ("cases_per_second", "output_tokens_per_second", *SHARES)
        names += ("flops_per_second", "bytes_per_second")
        ways[way] = {
            name: statistics.median(turn[name] for turn in good)
            for name in names
            if name in good[0]
        }
        ways[way] |= {"turns": [turn["seconds"] for turn in good]}
        kept = ("cases", "device", "decode_steps", "padding", "first_run_seconds", "torch")
        ways[way] |= {name: good[0][name] for name in kept if name in good[0]}
        if reference is not None and _SIZE.value == "30m":
            pairs = list(zip(good[0]["tokens"], reference, strict=False))
            ways[way]["same_answers_as_generate_32"] = float(np.mean([a == b for a, b in pairs]))
        if "other_batch_differs" in good[0]:
            differs, gaps = good[0]["other_batch_differs"], np.asarray(good[0]["gaps"])
            ways[way]["answers_that_differ_with_8_slots"] = float(np.mean(differs))
            ways[way]["gap"] = {f"p{p}": float(np.percentile(gaps, p)) for p in (5, 50, 95)}
    base = ways.get("generate 32", {}).get("cases_per_second")
    if base:
        for way in ways.values():
            if "cases_per_second" in way:
                way["times_generate_32"] = way["cases_per_second"] / base
    return {"ways": ways}


def print_table(ways: dict[str, dict]) -> None:
    columns = (
        ("cases/s", "cases_per_second", ".2f"),
        ("tokens/s", "output_tokens_per_second", ".1f"),
        ("generate 32", "times_generate_32", ".2f"),
        ("flop", SHARES[0], ".0%"),
        ("bandwidth", SHARES[1], ".0%"),
        ("both", SHARES[2], ".0%"),
        ("same tokens", "same_answers_as_generate_32", ".0%"),
    )
    widths = [max(9, len(head) + 2) for head, *_ in columns]
    print("\nCases and output tokens a second, times `generate 32`, shares of the floors, and")
    print("answers whose tokens are all those of `generate 32`:\n")
    heads = zip(columns, widths, strict=True)
    print(f"{'':28}" + "".join(f"{head:>{width}}" for (head, *_), width in heads))
    for way, row in ways.items():
        if "failed" in row:
            print(f"{way:28}  failed: {row['failed']}")
            continue
        cells = [f"{row[name]:{form}}" if name in row else "-" for _, name, form in columns]
        print(
            f"{way:28}"
            + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        )


if __name__ == "__main__":
    app.run(main)
