"""Fine-tune open language models on a clinic's radiation-oncology records, and prove it helped.

`load` is the notebook API; the commands are `python -m radonc_jax.<command> --help`.
"""

__version__ = "0.1.0"
__all__ = ["load"]


def load(
    model: str,
    adapter: str | None = None,
    dtype: str = "bfloat16",
    quantize: str | None = None,
):
    """A model to look into and to ask.

    >>> lm = radonc_jax.load("path/to/base", adapter="path/to/run", dtype="float32")
    >>> lm.generate(["Below is a diagnosis ..."])[0].text

    Args:
      model: Hugging Face folder or hub id; only a hub id that is not cached uses the network.
      adapter: PEFT adapter folder, or run folder of `train` (its best checkpoint).
      dtype: "bfloat16" or "float32", of the base weights and of the arithmetic.
      quantize: "int8" or "nf4" for the weights of the layers' projections; None to keep them too as
        `dtype` says.

    Returns:
      a `radonc_jax.notebook.LanguageModel`.

    Raises:
      FileNotFoundError: no such model, or a file of it is missing.
      ValueError: another architecture, damaged weights, an adapter of another base, an unknown
        `dtype` or `quantize`.
    """
    # Imported here: `radonc_jax.data` and `radonc_jax.tasks` must work without jax.
    from radonc_jax.notebook import LanguageModel

    return LanguageModel(model, adapter=adapter, dtype=dtype, quantize=quantize)
