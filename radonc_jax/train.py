"""Fine-tunes a model on a cohort, then compares it with the original.

    python -m radonc_jax.train --config=configs/mistral_icd.py --workdir=runs/mistral_icd

Started again with the same arguments, it resumes where it was; a finished run only answers what
has not been answered. One command per host: all of them run this same program. Told to end
(SIGTERM), it saves what was done and exits with code 75.

    ... --dry_run                           what it would do and need; no weights are read
    ... --compile_only --topology=v5e:4x4   memory and traffic on a TPU slice that is not there
    ... --profile=20:25                     a trace of these steps, for TensorBoard or Perfetto
"""

import contextlib
import math
import os
import sys
import time
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from radonc_jax import command
from radonc_jax.models import hub

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, e.g. configs/tiny_icd.py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Run folder; made if absent, resumed if not.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Only say what the run would do and need.")
_COMPILE_ONLY = flags.DEFINE_bool("compile_only", False, "Only compile the step for --topology.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "TPU slice to compile for, such as v5e:4x4.")
_PROFILE = flags.DEFINE_string("profile", None, "START:STOP, steps of which a trace is written.")
flags.mark_flags_as_required(["config"])


def main():
    if _COMPILE_ONLY.value != (_TOPOLOGY.value is not None):
        raise ValueError("--compile_only and --topology=NAME go together")
    if _COMPILE_ONLY.value:
        compile_only(_CONFIG.value.to_dict(), _TOPOLOGY.value)
        return
    if _WORKDIR.value is None and not _DRY_RUN.value:
        raise ValueError("--workdir is missing: the folder that the run is to be kept in")
    workdir = Path(_WORKDIR.value or os.devnull)
    # Before jax is imported, which takes seconds: a missing model is the commonest mistake.
    hub.resolve(_CONFIG.value.model, workdir)
    train(_CONFIG.value.to_dict(), workdir, dry_run=_DRY_RUN.value, profile=_PROFILE.value)


def train(
    config: dict, workdir: Path, *, dry_run: bool = False, profile: str | None = None
) -> None:
    """Runs `config`, all sections of `configs/common.py`, in `workdir`.

    Args:
      config: as a mapping.
      workdir: made if absent, resumed if not.
      dry_run: end after having told what the run would do and need.
      profile: "START:STOP", the steps of which a trace goes to `workdir`/profile.

    Raises:
      ValueError, FileNotFoundError: something does not fit; nothing has been trained then.
      FloatingPointError: a loss, a gradient or a trained array was not finite; the last checkpoint
        is whole.
      command.Preempted: SIGTERM came; what was done is on the disk.
    """
    from radonc_jax import parallel, settings
    from radonc_jax.training.preemption import Preemption

    config = settings.from_mapping(config)
    traced = _steps_to_trace(profile)
    parallel.initialize()
    with Preemption() as preemption:
        _train(config, workdir, dry_run, traced, preemption)


def _train(config, workdir: Path, dry_run: bool, traced, preemption) -> None:
    """`train`, its settings read and its processes joined; all of them ask `preemption` alike."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from radonc_jax import loading, parallel, settings, tracking
    from radonc_jax.answering import WatchfulDecoder, answer_split, constraints, variant
    from radonc_jax.data import batches, cohort
    from radonc_jax.evaluation import run as evaluation
    from radonc_jax.evaluation.report import describe, write_report
    from radonc_jax.models import huggingface, lora
    from radonc_jax.tasks import select
    from radonc_jax.training import checkpoint, meters, preflight, step
    from radonc_jax.training.optimizer import make_optimizer, make_schedule

    # ---- devices and model description: cheap checks first -------------------------------------
    parallel.quiet_third_parties()
    main_process = parallel.is_main_process()
    mesh = parallel.make_mesh(config.mesh)
    folder = hub.resolve(config.model, workdir)
    architecture = huggingface.read_config(folder)
    parallel.check_heads(architecture.num_heads, architecture.num_kv_heads, mesh)
    tokenizer = huggingface.load_tokenizer(folder)
    stops = huggingface.stop_tokens(folder, tokenizer)

    # ---- data ----------------------------------------------------------------------------------
    tasks = select(config.task)
    generates = tasks[0].name != "text"
    records = {split: cohort.load_records(config.cohort, split) for split in cohort.SPLITS}
    examples = {}
    for split in ("train", "validation"):
        examples[split], report = batches.split_examples(
            records[split], split, tasks, tokenizer, config.batch
        )
        if main_process:
            print(f"{split}: {report}")
    longest = max(example.length for split in examples.values() for example in split)
    if longest > architecture.max_position_embeddings:
        raise ValueError(
            f"the longest example has {longest} tokens, but the model's context ends at "
            f"{architecture.max_position_embeddings}: lower batch.sequence_length and choose a "
            "batch.over_length policy"
        )
    shards = int(np.prod([mesh.shape[axis] for axis in parallel.BATCH_AXES]))
    per_epoch = -(-len(examples["train"]) // config.batch.examples)
    epochs = -(-config.train.steps // per_epoch) if config.train.steps else config.train.epochs
    platform = mesh.devices.flat[0].platform
    compute = huggingface.as_dtype(config.precision.compute)

    def layout_for(attention: str) -> dict:
        return preflight.row_layout(architecture, platform, shards, attention, compute)

    def lay_out(layout: dict):
        return (
            batches.Batches(
                examples["train"], config.batch, epochs=epochs, seed=config.seed, **layout
            ),
            batches.Batches(examples["validation"], config.batch, epochs=1, seed=None, **layout),
        )

    layout = layout_for(config.train.attention)
    both = lay_out(layout)

    # ---- model without arrays: whatever can be refused is refused here -------------------------
    tracking.check_folder(workdir, config.as_dict())
    execution, why = preflight.choose_execution(
        config.train.attention,
        config.train.recompute,
        architecture,
        compute,
        huggingface.as_dtype(config.precision.stored),
        config.adapter,
        config.precision.quantized,
        both,
        mesh,
    )
    backend = execution.attention.backend
    if layout_for(backend) != layout:  # another attention than the rows were laid out for
        both = lay_out(layout_for(backend))
    train_batches, validation_batches = both
    steps = config.train.steps or train_batches.steps
    rows = [config.batch.microbatches, train_batches.rows, train_batches.row_length]
    partition = lora.partition(
        architecture, config.adapter, compute, config.precision.quantized, execution
    )
    begun = loading.begun_from(workdir)
    given = loading.starting_adapter(config.lora, architecture.num_layers, begun)
    optimizer = make_optimizer(config.optimizer, steps)
    schedule = make_schedule(config.optimizer, steps)
    shapes, placements = step.state_shardings(partition, optimizer, mesh)
    scheduler = None

    def decoder(trainable, frozen, done: str = "", progress=None) -> WatchfulDecoder:
        """`done` is told if the run is to end between two answers."""
        over_length = config.batch.over_length
        return WatchfulDecoder(
            scheduler,
            tokenizer,
            trainable,
            frozen,
            over_length,
            progress,
            trained=batches.prompt_room(config.batch.sequence_length),
            between=lambda: preemption.check(done),
        )

    if generates:
        scheduler = loading.make_scheduler(
            partition, mesh, architecture, stops, config.decode.batch, config.decode.max_new_tokens
        )
        longest = max(len(e.answer) for split in examples.values() for e in split)
        if longest > config.decode.max_new_tokens:
            raise ValueError(
                f"the longest answer has {longest} tokens, which decoding could never finish: "
                f"raise decode.max_new_tokens ({config.decode.max_new_tokens})"
            )
        for split in ("validation", "test") if config.final_evaluation else ("validation",):
            for task in tasks:
                decoder(None, None).encode(task, [record.diagnosis for record in records[split]])

    if dry_run:
        program = preflight.examine(
            preflight.compile_step(
                partition,
                optimizer,
                config.seed,
                mesh,
                huggingface.as_dtype(config.precision.stored),
                preflight.batch_shapes(
                    mesh,
                    config.batch.microbatches,
                    train_batches.rows // config.batch.microbatches,
                    train_batches.row_length,
                    train_batches.answer_capacity,
                ),
            ),
            mesh.devices.flat[0],
        )
        seconds, basis = preflight.seconds_of_run(
            architecture,
            steps * train_batches.rows * train_batches.row_length,
            list(mesh.devices.flat),
            compute,
            full=config.adapter is None,
        )
        if main_process:
            print(_plan(train_batches, steps, config))
            print(f"attention: {backend} ({why}); {parallel.describe(mesh)}")
            print(f"{program}")
            print(f"training alone: about {seconds / 60:.1f} min at {basis}")
        program.check()
        return

    # ---- arrays: straight to their places ------------------------------------------------------
    # A given adapter before the base: it is small, and may turn out not to fit.
    beginning = None if given is None else given.load(partition, mesh)
    weights = loading.load_base(folder, architecture, partition, config.precision.stored, mesh)
    if config.adapter is None:
        base, original = partition.frozen, weights
    else:
        base, original = weights, loading.new_adapter(partition, weights, config.seed, mesh)
    del weights
    origin = {
        "base": loading.base_origin(config.model, folder, main_process),
        "base_fingerprint_before": step.fingerprint(base),
        "cohort": tracking.cohort_sha256(config.cohort),
    }
    if given is not None:
        origin["init_from"] = given.origin()
        if given.step is not None:
            compared = {"base": origin["base"] if main_process else None}
            loading.check_origin(given.folder, compared, option="--config.model")
    elif begun is not None:
        origin["init_from"] = begun

    # ---- the run folder; resume: 1) its newest checkpoint  2) the model as it was loaded ---------
    if (workdir / "checkpoints").is_dir():
        compared = origin if main_process else origin | {"base": None}
        told = loading.told_fingerprint(workdir)
        if config.precision.quantized:  # codes may differ in a bit on another kind of device
            compared = compared | {"base_fingerprint_before": None}
        elif not told.startswith(step.FINGERPRINT):
            compared = compared | {"base_fingerprint_before": step.fingerprint(base, told)}
        loading.check_origin(workdir, compared)
    if config.lora.dropout:
        tracking.check_rows(workdir, rows)
    run = tracking.Run(workdir, config.as_dict(), main=main_process)
    if main_process:
        cohort.keep_copy(config.cohort, workdir)
    checkpoints = checkpoint.Checkpoints(workdir)
    preemption.check("no step was under way")
    restored = checkpoints.restore_newest(shapes, placements)
    if restored is not None:
        start, state, progress = restored
    else:
        start, progress = 0, checkpoint.Progress()
        # A copy, because the state is donated and the original answers later.
        begin = jax.jit(
            lambda trainable: step.TrainState(
                jnp.int32(0), jax.tree.map(jnp.copy, trainable), optimizer.init(trainable)
            ),
            out_shardings=placements,
        )
        state = begin(original if beginning is None else beginning)
    del beginning
    if config.adapter is None:
        del original
    manifest = origin | {
        "task": config.task,
        "steps": steps,
        "seed": config.seed,
        "architecture": {
            "name": huggingface.read_architecture(folder),
            "layers": architecture.num_layers,
            "parameters": meters.parameters(architecture),
        },
        "parameters": {
            "trainable": lora.count(partition.trainable),
            "frozen": lora.count(partition.frozen),
        },
        "mesh": dict(mesh.shape),
        "packing_fill": round(train_batches.fill, 4),
        "rows": rows,
        "attention": backend,
        "layers": "one by one" if execution.unrolled else "a loop",
        "environment": tracking.environment(),
    }
    run.write_manifest(manifest)
    if main_process:
        if start:
            print(f"resumed at step {start} of {steps}")
        trained, frozen = manifest["parameters"].values()
        print(f"{parallel.describe(mesh)}; attention: {backend} ({why})")
        print(f"{trained:,} parameters train, {frozen:,} are frozen")
        print(_plan(train_batches, steps, config))

    # ---- what is jitted ------------------------------------------------------------------------
    train_step = step.jit_train_step(partition, optimizer, config.seed, mesh)
    evaluation_step = step.jit_evaluation_step(partition, mesh)

    def place(batch):
        return parallel.put(batch, mesh, None, parallel.BATCH_AXES)

    norm_of = jax.jit(optax.tree.norm, out_shardings=parallel.replicated(mesh))

    def not_finite(number: int, what: str, cases: list[str]) -> FloatingPointError:
        """The error that ends the run; the ids of the cases, which may be many, go to a file."""
        path = workdir / "not_finite.json"
        if main_process:
            tracking.write_json(path, {"step": number, "what": what, "cases": cases})
        return FloatingPointError(
            f"step {number}: {what}; the ids of its {len(cases)} cases are in {path}. Lower "
            "optimizer.learning_rate (in another --workdir), or look at these cases"
        )

    def validate(number: int, trainable) -> dict[str, float]:
        saved = f"step {number} of {steps} is saved"
        loss_sum = answer_tokens = 0.0
        for index in range(validation_batches.steps):
            sums = jax.device_get(
                evaluation_step(trainable, base, place(validation_batches[index]))
            )
            if not math.isfinite(sums["loss_sum"]):
                what = f"validation loss {sums['loss_sum']}"
                raise not_finite(number, what, validation_batches.case_ids(index))
            loss_sum += float(sums["loss_sum"])
            answer_tokens += float(sums["answer_tokens"])
            preemption.check(saved)
        values = {"loss": loss_sum / answer_tokens}
        if config.train.metric != "loss":
            chosen = records["validation"][: config.train.validation_cases or None]
            result = evaluation.evaluate(
                decoder(trainable, base, saved),
                chosen,
                tasks,
                split="validation",
                model="tuned",
                output=None,
                bootstrap=0,
            )
            for name in ("accuracy", "rouge1", "f1_macro"):
                scores = [
                    scores[name]["value"] for scores in evaluation.split_tasks(result).values()
                ]
                known = [score for score in scores if score is not None]
                if known:
                    values[name] = sum(known) / len(known)
        return values

    # ---- loop ----------------------------------------------------------------------------------
    run.start(start, steps)
    pace = meters.Pace()
    per_token = meters.flops_per_token(architecture, full=config.adapter is None)

    def finish(number: int, metrics, show: bool) -> None:
        """Logs a step when its numbers arrive; the next one is already on its way then."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not all(math.isfinite(value) for value in values.values()):
            what = f"loss {values['loss']}, gradient norm {values['gradient_norm']}"
            raise not_finite(number, what, train_batches.case_ids(number - 1))
        tokens = train_batches.useful_tokens(number - 1)
        values |= {"tokens": tokens, "tokens_per_second": pace.step(tokens)}
        # After the time is taken: the schedule is a program too, which waits for the next step.
        values["learning_rate"] = float(schedule(number - 1))
        peak = meters.peak_memory_bytes()
        if peak is not None:
            values["peak_memory_bytes"] = peak
        used = meters.mfu(values["tokens_per_second"], per_token, list(mesh.devices.flat))
        if used is not None:
            values["mfu"] = used
        run.log(number, "train", values, show=show)
        run.advance()

    def judge(number: int, trainable) -> None:
        """Validates a saved step, unless a run that was cut off has done so, and notes the best."""
        values = parallel.on_main(lambda: run.logged(number, "validation"))
        if values is None:
            values = validate(number, trainable)
            run.log(number, "validation", values, show=True)
        progress.judge(
            number,
            values[config.train.metric],
            sign=settings.METRICS[config.train.metric],
            patience=config.train.patience,
        )
        checkpoints.name_best(progress)
        pace.restart()

    # Closed whatever happens: a checkpoint on its way to the disk is finished first.
    with (
        preemption.deferred(),
        jax.set_mesh(mesh),
        contextlib.closing(run),
        contextlib.closing(checkpoints),
        contextlib.ExitStack() as tracing,
    ):
        if progress.validation_due:
            judge(start, state.trainable)
        pending = None
        for number in range(start + 1, steps + 1):
            if progress.stopped_early:
                break
            if traced and number == max(traced[0], start + 1) <= traced[1]:
                jax.profiler.start_trace(str(workdir / "profile"))
                tracing.callback(jax.profiler.stop_trace)
            state, metrics = train_step(state, base, place(train_batches[number - 1]))
            if pending is not None:
                finish(*pending)
            pending = (number, metrics, number % config.train.log_every == 0 or number == steps)
            if traced and start < number == min(traced[1], steps):
                jax.block_until_ready(state)
                tracing.close()
            evaluates = number == steps or _every(number, config.train.evaluate_every)
            told_to_end = preemption.reached()
            if evaluates or told_to_end or _every(number, config.train.save_every):
                # Nothing that is not finite is saved: it would end every run that goes on from it.
                finish(*pending)
                pending = None
                norm = float(norm_of(state.trainable))
                if not math.isfinite(norm):
                    what = f"norm of the trained arrays {norm}"
                    raise not_finite(number, what, train_batches.case_ids(number - 1))
                # Before the validation, which may take longer than a machine is left.
                progress.validation_due = evaluates
                checkpoints.save(number, state, progress)
                if told_to_end:
                    checkpoints.wait()
                    raise command.Preempted(f"step {number} of {steps} is saved")
                if evaluates:
                    judge(number, state.trainable)
                pace.restart()
        preemption.check("all steps are saved")  # told in the last validation

    # ---- afterwards: what was frozen is unchanged; original against tuned ----------------------
    manifest["base_fingerprint_after"] = step.fingerprint(base)
    if manifest["base_fingerprint_after"] != manifest["base_fingerprint_before"]:
        raise ValueError("the frozen base changed during training: a bug; do not use this run")
    del state
    wanted = progress.best_step or "latest"
    try:
        checkpoint.find_step(workdir, wanted)
    except FileNotFoundError as error:  # moved away by hand, because it was damaged
        if main_process:
            print(f"{error}; the last one is evaluated in its place", file=sys.stderr, flush=True)
        wanted = "latest"
        checkpoint.write_best(workdir, checkpoint.Progress())
    best, trainable = checkpoint.restore_trainable(
        workdir, partition.trainable, placements.trainable, wanted
    )
    manifest |= {"best_step": best, "trained_fingerprint": step.fingerprint(trainable)}
    run.write_manifest(manifest)
    if not config.final_evaluation:
        return
    if config.adapter is None:
        original = loading.load_base(folder, architecture, partition, "float32", mesh)
    closed = constraints(config, tokenizer) if config.decode.constrained else {}
    for model, number, arrays in (("original", None, original), ("tuned", best, trainable)):
        origin = {
            "step": number,
            "trained_fingerprint": step.fingerprint(arrays),
            "base_fingerprint": manifest["base_fingerprint_after"],
            "base": str(folder),
            **loading.arithmetic(architecture, config.adapter),
        }
        for constrained in [None, closed] if closed else [None]:
            answer_split(
                decoder(arrays, base, "the answers so far are kept", f"{model}, test"),
                records["test"],
                tasks,
                split="test",
                model=variant(model, constrained),
                output=workdir / "evaluation" / "test" / variant(model, constrained),
                config=config,
                origin=origin
                | ({} if constrained is None else {"constrained": config.decode.constrained}),
                constrained=constrained,
            )
    if main_process:
        print(describe(write_report(workdir, "test"), workdir))


def compile_only(config: dict, topology: str) -> None:
    """Compiles the step of `config` for a TPU slice that need not be there: what it needs.

    The model's folder needs its `config.json` alone. With its tokenizer and the cohort at hand, the
    batch is the one that `train` would make there; else each example has a full row of
    `batch.sequence_length`, which is the most that it could be, an eighth of its tokens answers.

    Raises:
      ValueError: the slice is not known, or the step does not fit it.
    """
    from radonc_jax import parallel, settings
    from radonc_jax.models import attention, huggingface, lora
    from radonc_jax.models.decoder import Execution
    from radonc_jax.training import preflight
    from radonc_jax.training.optimizer import make_optimizer

    config = settings.from_mapping(config)
    parallel.quiet_third_parties()
    folder = hub.resolve(config.model)
    architecture = huggingface.read_config(folder)
    devices = preflight.topology_devices(topology)
    mesh = parallel.make_mesh(config.mesh, devices)
    parallel.check_heads(architecture.num_heads, architecture.num_kv_heads, mesh)
    shards = math.prod(mesh.shape[axis] for axis in parallel.BATCH_AXES)
    rows, length, answers, basis = preflight.rows_to_compile(
        config.task, config.cohort, folder, config.batch, config.seed, architecture, shards
    )
    compute = huggingface.as_dtype(config.precision.compute)
    backend, why = attention.choose_backend(
        config.train.attention,
        platform="tpu",
        dtype=compute,
        num_heads=architecture.num_heads,
        num_kv_heads=architecture.num_kv_heads,
        head_dim=architecture.head_dim,
        row_lengths=[length],
        proven=False,
    )
    partition = lora.partition(
        architecture,
        config.adapter,
        compute,
        config.precision.quantized,
        Execution(attention.AttentionConfig(backend), config.train.recompute),
    )
    sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    print(
        f"{topology}: {mesh.size} {devices[0].device_kind} as {sizes}, attention: {backend} ({why})"
    )
    print(f"{config.batch.microbatches} x {rows} rows of {length} tokens a step: {basis}")
    batch = preflight.batch_shapes(mesh, config.batch.microbatches, rows, length, answers)
    began = time.monotonic()
    compiled = preflight.compile_step(
        partition,
        make_optimizer(config.optimizer, 100),
        config.seed,
        mesh,
        huggingface.as_dtype(config.precision.stored),
        batch,
    )
    program = preflight.examine(compiled, devices[0])
    print(program)
    for kind in sorted({kind for kind, _ in program.moved}):
        moved = [size for other, size in program.moved if other == kind]
        print(f"{kind}: {len(moved)} in the program, the largest of {max(moved) / 2**20:.1f} MiB")
    print(f"compiled in {time.monotonic() - began:.0f} s")
    program.check()


def _plan(batches, steps: int, config) -> str:
    answers = sum(len(example.answer) for example in batches.examples)
    return (
        f"{steps} steps of {config.batch.examples} examples in {batches.rows} rows of "
        f"{batches.row_length} tokens, {batches.fill:.1%} filled; {answers:,} answer tokens an "
        "epoch carry the loss"
    )


def _steps_to_trace(profile: str | None) -> tuple[int, int] | None:
    """The first and last step of "START:STOP"; ValueError when it is none."""
    if profile is None:
        return None
    start, _, stop = profile.partition(":")
    if not (start.isdigit() and stop.isdigit() and 1 <= int(start) <= int(stop)):
        raise ValueError(f"--profile={profile} must be START:STOP, steps counted from 1")
    return int(start), int(stop)


def _every(number: int, period: int) -> bool:
    return period > 0 and number % period == 0


if __name__ == "__main__":
    command.run(main, stopped="stopped: the same command goes on from the last checkpoint")
