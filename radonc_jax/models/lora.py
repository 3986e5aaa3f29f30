"""Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685) from outside the model.

`inject` replaces named `Linear` modules by `LoRALinear`; `partition` says which arrays train.
Shapes are those of PEFT: `a` [L, rank, in] and `b` [L, out, rank], so adapters go in and out
without a transposition. Adapters are float32 whatever the base is.
"""

import functools
import zlib
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from radonc_jax.models import quantize
from radonc_jax.models.decoder import (
    OUTPUT_NAMES,
    PROJECTIONS,
    Decoder,
    Execution,
    Linear,
    ModelConfig,
)
from radonc_jax.models.products import COLUMNS, matmul_precision
from radonc_jax.parallel import path_name


class LoRAParam(nnx.Variable):
    """An adapter's parameter. Not an `nnx.Param`: a split on `Param` must not take it."""


class DropoutKey(nnx.Variable):
    """Raw PRNG keys, uint32 [L, 2], set anew at each step; neither trained nor saved."""


@dataclass(frozen=True)
class LoRAConfig:
    """The adapter.

    Attributes:
      rank: inner size r.
      alpha: the update is scaled by alpha / r, or alpha / sqrt(r) with `rslora`.
      dropout: share of the adapter's inputs set to zero in training, 0 <= dropout < 1.
      targets: projections that get an adapter, of `PROJECTIONS`.
      rslora: rank-stabilised scaling (Kalajdzievski 2023, arXiv 2312.03732).
      dora: weight-decomposed adaptation (Liu et al. 2024, arXiv 2402.09353).
      rank_pattern: ranks of single targets that differ from `rank`, as a mapping or as pairs;
        kept as sorted pairs, without those that equal `rank`.
      alpha_pattern: the same for `alpha`.
      init_from: adapter that training starts from, a PEFT folder or a run folder; "" for a fresh
        one. It is no part of what the adapter is: configurations are equal without it.
    """

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    rslora: bool
    dora: bool
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    init_from: str = field(default="", compare=False)

    def __post_init__(self):
        object.__setattr__(self, "targets", tuple(self.targets))
        unknown = sorted(set(self.targets) - set(PROJECTIONS))
        if unknown:
            raise ValueError(
                f"lora.targets names unknown projections {unknown}; there are {list(PROJECTIONS)}"
            )
        if not self.targets or len(set(self.targets)) != len(self.targets):
            raise ValueError(f"lora.targets must name each projection once: {self.targets}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout must be at least 0 and below 1, not {self.dropout}")
        if self.init_from is None:
            object.__setattr__(self, "init_from", "")
        if not isinstance(self.init_from, str):
            raise ValueError(f"lora.init_from must name a folder, not {self.init_from!r}")
        self._check_rank("rank", self.rank)
        self._check_alpha("alpha", self.alpha)
        for name, check in (("rank", self._check_rank), ("alpha", self._check_alpha)):
            given = getattr(self, f"{name}_pattern") or ()
            try:
                pattern = dict(given)
            except (TypeError, ValueError):
                raise ValueError(
                    f"lora.{name}_pattern must map projections to values, not {given!r}"
                ) from None
            unknown = sorted(map(str, set(pattern) - set(self.targets)))
            if unknown:
                raise ValueError(
                    f"lora.{name}_pattern names {unknown}, which lora.targets does not: "
                    f"{self.targets}"
                )
            for projection, value in pattern.items():
                check(f"{name}_pattern[{projection!r}]", value)
            default = getattr(self, name)
            kept = sorted((key, value) for key, value in pattern.items() if value != default)
            object.__setattr__(self, f"{name}_pattern", tuple(kept))

    @staticmethod
    def _check_rank(name: str, value) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"lora.{name} must be a whole number of at least 1, not {value!r}")

    @staticmethod
    def _check_alpha(name: str, value) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ValueError(f"lora.{name} must be a positive number, not {value!r}")

    def of(self, projection: str) -> "LoRAConfig":
        """The configuration of one target alone, with its own rank and alpha."""
        return replace(
            self,
            targets=(projection,),
            rank=dict(self.rank_pattern).get(projection, self.rank),
            alpha=dict(self.alpha_pattern).get(projection, self.alpha),
            rank_pattern=(),
            alpha_pattern=(),
        )

    @property
    def scale(self) -> float:
        """Of the update; with a pattern there are several, and `of` must be asked first."""
        if self.rank_pattern or self.alpha_pattern:
            raise ValueError("ranks or alphas differ between targets: ask `of(projection).scale`")
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


class LoRALinear(nnx.Module):
    """`base(x) + scale * B A x`, with A and B stacked over layers like the base's kernel."""

    def __init__(self, base: Linear, config: LoRAConfig):
        layers, out_size, in_size = base.shape
        self.base = base
        self.a = LoRAParam(jnp.zeros((layers, config.rank, in_size)))
        self.b = LoRAParam(jnp.zeros((layers, out_size, config.rank)))
        self.scale = config.scale
        self.dropout = config.dropout
        self.deterministic = False
        self.dora = config.dora
        if config.dora:
            self.magnitude = LoRAParam(jnp.ones((layers, out_size)))
        if config.dropout:
            self.dropout_key = DropoutKey(jnp.zeros((layers, 2), jnp.uint32))

    def __call__(self, x: jax.Array) -> jax.Array:
        base_output = self.base(x)
        dropped = self.dropout > 0 and not self.deterministic
        adapter_input = x
        if dropped:
            key = jax.random.wrap_key_data(self.dropout_key[...])
            keep = jax.random.bernoulli(key, 1 - self.dropout, x.shape)
            adapter_input = jnp.where(keep, x / (1 - self.dropout), 0).astype(x.dtype)
        # Scaled where it is smallest: at rank size.
        update = thin_product(thin_product(adapter_input, self.a[...]) * self.scale, self.b[...])
        if not self.dora:
            return base_output + update
        # As in PEFT, dropout reaches the direction's base term too, and the norm is a constant
        # of the backward pass (section 4.3 of the DoRA paper).
        merged = merge_kernel(self.base.weight(jnp.float32), self.a[...], self.b[...], self.scale)
        norm = jax.lax.stop_gradient(jnp.linalg.norm(merged, axis=-1))
        ratio = self.magnitude[...] / checkpoint_name(norm, "norm")
        # The magnitude's gradient asks for the direction, so that it is kept (`SAVED_NAMES`).
        if dropped:
            direction = checkpoint_name(self.base(adapter_input), "direction")
        else:
            direction = base_output = checkpoint_name(base_output, "direction")
        # One is taken off in float32, before rounding.
        change = (ratio - 1).astype(x.dtype)
        return base_output + change * direction + ratio.astype(x.dtype) * update


@jax.custom_vjp
def thin_product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [..., I] times a float32 parameter [O, I], in the dtype of x: [..., O].

    The parameter's gradient is summed over tokens, and by the compiler over devices, in float32:
    in the dtype of a bfloat16 model, what many tokens add would be lost to rounding.
    """
    size, weight = len(weight), weight.astype(x.dtype)
    if x.dtype == jnp.float32:  # a row's numbers are then the same beside any others
        weight = jnp.pad(weight, [(0, -size % COLUMNS), (0, 0)])
    product = jnp.einsum("...I,OI->...O", x, weight, precision=matmul_precision(x.dtype))
    return product[..., :size]


def _thin_forward(x, weight):
    return thin_product(x, weight), (x, weight)


def _thin_backward(saved, gradient):
    x, weight = saved
    precision = matmul_precision(x.dtype)
    to_x = jnp.einsum("...O,OI->...I", gradient, weight.astype(x.dtype), precision=precision)
    over_tokens = functools.partial(
        jnp.einsum, precision=precision, preferred_element_type=jnp.float32
    )
    # The narrow factor comes first: XLA's CPU compiler turns the first one over in memory before it
    # sums over tokens, which for the wide one took a third of a training step.
    if weight.shape[0] <= weight.shape[1]:
        return to_x, over_tokens("...O,...I->OI", gradient, x)
    return to_x, over_tokens("...I,...O->IO", x, gradient).T


thin_product.defvjp(_thin_forward, _thin_backward)


def merge_kernel(kernel, a, b, scale):
    """W + scale B A in float32; [..., out, in] of stacked or single layers."""
    product = jnp.einsum(
        "...OR,...RI->...OI",
        b.astype(jnp.float32),
        a.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    return kernel.astype(jnp.float32) + scale * product


def inject(model: Decoder, config: LoRAConfig) -> Decoder:
    """Puts adapters on the named projections of every layer, in place.

    Raises:
      ValueError: the number of adapted projections is not the number of targets.
    """
    count = 0
    for name in config.targets:
        parent = getattr(model.layers, PROJECTIONS[name])
        if isinstance(getattr(parent, name), Linear):
            setattr(parent, name, LoRALinear(getattr(parent, name), config.of(name)))
            count += 1
    if count != len(config.targets):
        raise ValueError(
            f"{count} of {len(config.targets)} projections could take an adapter; "
            "is there one already?"
        )
    if config.dora and not config.dropout:
        names = tuple(OUTPUT_NAMES[name] for name in config.targets if name in OUTPUT_NAMES)
        model.execution = replace(model.execution, implied=names)
    return model


@dataclass(frozen=True)
class Partition:
    """A model taken apart: what trains, what is frozen, and how to put it together.

    Attributes:
      graph: the modules, without arrays.
      trainable: shapes of the trained parameters (adapter, or all of the model).
      frozen: shapes of the others; empty when the whole model trains.
      keys: shapes of the dropout keys; empty without dropout.
    """

    graph: nnx.GraphDef
    trainable: nnx.State
    frozen: nnx.State
    keys: nnx.State

    def merge(self, trainable, frozen, dropout_key: jax.Array | None = None) -> Decoder:
        """The model with these arrays; dropout is on only when a key is given."""
        data = jax.random.key_data(jax.random.key(0) if dropout_key is None else dropout_key)

        def layer_keys(path, leaf):
            key = jax.random.wrap_key_data(data)
            key = jax.random.fold_in(key, zlib.crc32(path_name(path).encode()))
            return jax.random.key_data(jax.random.split(key, leaf.shape[0]))

        keys = jax.tree_util.tree_map_with_path(layer_keys, self.keys)
        model = nnx.merge(self.graph, trainable, keys, frozen)
        if dropout_key is None:
            model.eval()
        return model


def partition(
    config: ModelConfig,
    lora: LoRAConfig | None,
    dtype,
    quantized: str | None = None,
    execution: Execution | None = None,
) -> Partition:
    """The abstract model, split into trained and frozen arrays.

    Args:
      config: the architecture.
      lora: the adapter, which then is all that trains; None to train the whole model.
      dtype: of activations.
      quantized: how the projections' kernels are kept, "int8" or "nf4"; None as they are.
      execution: of training; None for the plain way.

    Raises:
      ValueError: a projection whose size does not suit `quantized`.
    """

    def build():
        model = Decoder(config, dtype=dtype, execution=execution, rngs=nnx.Rngs(0))
        if quantized is not None:
            model = quantize.replace(model, quantized)
        return model if lora is None else inject(model, lora)

    trained = nnx.Param if lora is None else LoRAParam
    graph, trainable, keys, frozen = nnx.split(nnx.eval_shape(build), trained, DropoutKey, ...)
    return Partition(graph, trainable, frozen, keys)


def init(abstract: nnx.State, frozen: nnx.State, seed: int) -> nnx.State:
    """A fresh adapter: `a` uniform as PEFT draws it, `b` zero, magnitudes the base's row norms.

    With `b` zero the adapted model equals its base exactly (for DoRA, up to rounding of the norm).

    Args:
      abstract: shapes of the adapter, from `partition`.
      frozen: the base, read for DoRA's magnitudes only.
      seed: of the draw; each array's values depend on the seed and its path alone.
    """
    base = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(frozen)}

    def row_norms(place):
        # Layer by layer: a whole stack in float32 would be twice the size of a bfloat16 base.
        parts = {kind: base.get(f"{place}/{kind}") for kind in ("kernel", "codes", "scales")}
        return jax.lax.map(_row_norms, {kind: x for kind, x in parts.items() if x is not None})

    def draw(path, leaf):
        name = path_name(path)
        kind = name.rsplit("/", 1)[1]
        if kind == "a":
            key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
            bound = leaf.shape[-1] ** -0.5
            return jax.random.uniform(key, leaf.shape, leaf.dtype, -bound, bound)
        if kind == "magnitude":
            return row_norms(name.removesuffix("magnitude") + "base")
        return jnp.zeros(leaf.shape, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract)


def _row_norms(layer: dict[str, jax.Array]) -> jax.Array:
    """Float32 norm [out] of each row of one layer's kernel, plain or quantised."""
    kernel = layer["kernel"] if "kernel" in layer else quantize.decode(**layer)
    return jnp.linalg.norm(kernel.astype(jnp.float32), axis=-1)


def adapted_kernel(kernel, a, b, magnitude, config: LoRAConfig) -> jax.Array:
    """One kernel with its adapter added, float32 [..., out, in]; `magnitude` None without DoRA.

    `config` is that of the kernel's own projection, from `LoRAConfig.of`.
    """
    weight = merge_kernel(kernel, a, b, config.scale)
    if not config.dora:
        return weight
    return weight * (magnitude / jnp.linalg.norm(weight, axis=-1))[..., None]


def count(state: nnx.State) -> int:
    """Number of parameters in a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(state))
