"""How programs are compiled: what XLA is told on each platform, and compiling before it is needed.

What XLA is told was measured on an H200 with JAX 0.11.2 (`LOG.md`), but for the CPU's.
"""

import functools
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import jax

# Options of XLA by platform and kind of program.
OPTIONS: dict[str, dict[str, dict]] = {
    # Products by cuBLAS alone, in bfloat16: a decode step took 14.0 ms with the two options below,
    # and 22.7 with neither.
    "gpu": {
        # Where what is kept for the backward pass is stacked by a loop, the pass that spares
        # copies of slices runs each such product twice.
        "training by a loop": {
            "xla_gpu_enable_triton_gemm": False,
            "xla_gpu_enable_dynamic_slice_fusion": False,
        },
        "training": {"xla_gpu_enable_triton_gemm": False},
        # Products with one left factor are not made one: their kernels would be copied together.
        "decoding": {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0},
    },
    "cpu": {},
}
if jax.__version_info__ >= (0, 11):
    # Its library of fused products adds up in an order that depends on the rows. An older version
    # knows the option too, and without it adds up in the order that is wanted.
    OPTIONS["cpu"]["decoding"] = {"xla_cpu_experimental_ynn_fusion_type": ""}


def options(device: jax.Device, work: str) -> dict | None:
    """What XLA is told for a kind of program, but for what this version of it does not know.

    Args:
      device: one of those that it is for.
      work: "training", "training by a loop" or "decoding".

    Returns:
      `compiler_options` of `jax.jit`; None where there are none.
    """
    platform = "gpu" if device.platform == "cuda" else device.platform
    wanted = OPTIONS.get(platform, {}).get(work, {})
    return {name: value for name, value in wanted.items() if _known(name, value)} or None


@functools.cache
def _known(name: str, value) -> bool:
    """Whether this XLA has the option: those of all platforms are read on any."""
    try:
        jax.jit(lambda: 0).lower().compile(compiler_options={name: value})
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" in str(error):
            return False
        raise
    return True


class Ahead:
    """A jitted function that can be compiled for arguments to come while something else runs.

    Args:
      function: from `jax.jit`.
      workers: threads that compile, or None: the function is compiled when it is called.
    """

    def __init__(self, function: Callable, workers: ThreadPoolExecutor | None):
        self._function, self._workers = function, workers
        self._compiled: dict[tuple, Future] = {}

    def lower(self, *arguments):
        """As that of the function."""
        return self._function.lower(*arguments)

    def expect(self, *arguments) -> None:
        """Compiles for such arguments, of which shapes, types and places count; does not wait."""
        if self._workers is None or (key := _key(arguments)) in self._compiled:
            return
        mesh = jax.sharding.get_mesh()
        shapes = jax.tree.map(_shape, arguments)

        def compiled():
            with jax.set_mesh(mesh):
                return self._function.lower(*shapes).compile()

        self._compiled[key] = self._workers.submit(compiled)

    def __call__(self, *arguments):
        key = _key(arguments) if self._compiled else None
        if key in self._compiled:
            try:
                program = self._compiled[key].result()
            except Exception:  # it may have been memory, and whatever it is comes again
                del self._compiled[key]
            else:
                return program(*arguments)
        return self._function(*arguments)

    def cancel(self) -> None:
        """Drops what was expected and has not been begun."""
        for key, future in list(self._compiled.items()):
            if future.cancel():
                del self._compiled[key]


def _shape(x):
    if not isinstance(x, jax.Array):
        return x
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _key(arguments) -> tuple:
    leaves, structure = jax.tree.flatten(arguments)
    return structure, tuple(
        (x.shape, x.dtype, x.sharding if isinstance(x, jax.Array) else None) for x in leaves
    )


def workers(device: jax.Device) -> ThreadPoolExecutor | None:
    """Threads for `Ahead` on GPUs. None on a CPU, whose cores they would take from the work itself,
    on TPUs, where it has not been tried, and in a run of several processes, which have to compile
    in one order."""
    if device.platform not in ("gpu", "cuda", "rocm") or jax.process_count() > 1:
        return None
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="compile")
