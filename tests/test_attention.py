"""Attention backends: the same outputs, and a self-test that catches those that leak."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radonc_jax import parallel
from radonc_jax.models import attention
from radonc_jax.models.attention import AttentionConfig, attend, choose_backend, see, self_test


def forward_by_xla(query, key, value, lengths, starts, window):
    """JAX's public function, with its own log-sum-exp in float32; for packed rows a dense one."""
    if starts is not None:
        return packed_forward(query, key, value, lengths, starts, window)

    def run(query, key, value):
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            query_seq_lengths=lengths,
            key_value_seq_lengths=lengths,
            local_window_size=None if window is None else (window - 1, 0),
            implementation="xla",
            return_residual=True,
        )

    wide = (x.astype(jnp.float32) for x in (query, key, value))
    return run(query, key, value)[0], run(*wide)[1].transpose(0, 2, 1)


def seen_in_place(length, lengths, starts, window):
    """bool [R, P, S] by where the segments of each row begin and how long they are."""
    place = jnp.arange(length)
    ends = jnp.where(lengths > 0, starts[:, :-1] + lengths, -1)
    inside = (place >= starts[:, :-1, None]) & (place < ends[..., None])  # [R, E, P]
    distance = place[:, None] - place
    same = jnp.any(inside[..., :, None] & inside[..., None, :], axis=1)
    return same & (distance >= 0) & (distance < (window or length))


def packed_forward(query, key, value, lengths, starts, window):
    """As cuDNN does it by JAX's documentation: statistics by segment, without gaps."""
    groups = query.shape[2] // key.shape[2]
    wide = (x.astype(jnp.float32) for x in (query, key, value))
    query_, key_, value_ = wide
    key_, value_ = (jnp.repeat(x, groups, axis=2) for x in (key_, value_))
    scores = query.shape[3] ** -0.5 * jnp.einsum("RPNH,RSNH->RNPS", query_, key_)
    seen = seen_in_place(query.shape[1], lengths, starts, window)
    scores = jnp.where(seen[:, None], scores, -jnp.inf)
    log_sum_exp = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(log_sum_exp), log_sum_exp, 0)[..., None])
    # What lies in no segment is never written: whatever was there before, here NaN.
    output = jnp.einsum("RNPS,RSNH->RPNH", weights, value_)
    output = jnp.where(seen.any(-1)[..., None, None], output, jnp.nan)
    parts = [
        jnp.roll(log_sum_exp[row], -starts[row, number], axis=-1)
        for row in range(lengths.shape[0])
        for number in range(lengths.shape[1])
    ]
    order = jnp.argsort(lengths.ravel() <= 0, stable=True)
    parts = jnp.where((lengths.ravel() > 0)[:, None, None], jnp.stack(parts), jnp.nan)[order]
    return output.astype(query.dtype), parts


def of_rows(log_sum_exp, lengths, starts):
    """Statistics by segment [R * E, N, P] as those of rows [R, N, P]."""
    rows, most = lengths.shape
    back = jnp.argsort(jnp.argsort(lengths.ravel() <= 0, stable=True))
    parts = log_sum_exp[back].reshape(rows, most, *log_sum_exp.shape[1:])
    place = jnp.arange(log_sum_exp.shape[-1])
    made = []
    for row in range(rows):
        total = jnp.full(parts.shape[2:], jnp.inf)
        for number in range(most):
            start, length = starts[row, number], lengths[row, number]
            inside = (length > 0) & (place >= start) & (place < start + length)
            total = jnp.where(inside, jnp.roll(parts[row, number], start, axis=-1), total)
        made.append(total)
    return jnp.stack(made)


def backward_by_xla(query, key, value, lengths, starts, window, output, log_sum_exp, gradient):
    """Dao 2023, arXiv 2307.08691, section 3.1.2: from what the forward pass left, and no more."""
    query_, key_, value_, output, gradient = (
        x.astype(jnp.float32) for x in (query, key, value, output, gradient)
    )
    groups, scale = query.shape[2] // key.shape[2], query.shape[3] ** -0.5
    key_, value_ = (jnp.repeat(x, groups, axis=2) for x in (key_, value_))
    scores = scale * jnp.einsum("RPNH,RSNH->RNPS", query_, key_)
    if starts is None:
        distance = jnp.arange(query.shape[1])[:, None] - jnp.arange(key.shape[1])
        seen = (distance >= 0) & (distance < (window or key.shape[1]))
        seen = seen & (jnp.arange(key.shape[1]) < lengths[:, None, None])
    else:
        seen = seen_in_place(query.shape[1], lengths, starts, window)
        log_sum_exp = of_rows(log_sum_exp, lengths, starts)
    weights = jnp.where(seen[:, None], jnp.exp(scores - log_sum_exp[..., None]), 0)
    to_weights = jnp.einsum("RPNH,RSNH->RNPS", gradient, value_)
    to_weights -= jnp.einsum("RPNH,RPNH->RNP", gradient, output)[..., None]
    to_scores = scale * weights * to_weights

    def summed(x):
        return x.reshape(*key.shape[:3], groups, key.shape[3]).sum(3)

    return (
        jnp.einsum("RNPS,RSNH->RPNH", to_scores, key_).astype(query.dtype),
        summed(jnp.einsum("RNPS,RPNH->RSNH", to_scores, query_)).astype(key.dtype),
        summed(jnp.einsum("RNPS,RPNH->RSNH", weights, gradient)).astype(value.dtype),
    )


# The arithmetic of XLA in the place of cuDNN's: the layout is ours, and runs anywhere.
XLA = attention.Kernels(forward_by_xla, backward_by_xla)
XLA_IN_CUDNN_LAYOUT = functools.partial(attention._cudnn, kernels=XLA)


@pytest.fixture
def cudnn_layout(monkeypatch):
    monkeypatch.setattr(attention, "_cudnn", XLA_IN_CUDNN_LAYOUT)


def slow_attention(query, key, value, segments, window):
    """Token by token, in float64; [T, N, H] and [T, K, H]."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    output = np.zeros_like(query)
    groups = query.shape[1] // key.shape[1]
    for t in range(query.shape[0]):
        seen = [s for s in range(t + 1) if segments[s] == segments[t]]
        seen = [s for s in seen if window is None or t - s < window]
        for head in range(query.shape[1]):
            scores = key[seen, head // groups] @ query[t, head] / np.sqrt(query.shape[2])
            weights = np.exp(scores - scores.max())
            output[t, head] = weights / weights.sum() @ value[seen, head // groups]
    return output


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("backend", ["xla", "cudnn_packed", "cudnn", "splash"])
def test_every_backend_is_the_slow_one(backend, window, cudnn_layout, monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 48)  # the row has three blocks, the last shorter
    head_dim = 128 if backend == "splash" else 8
    rng = np.random.default_rng(1)
    segments = np.repeat([1, 2, 3, 0], [40, 1, 70, 17])[None].astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in (40, 1, 70, 17)])[None].astype(np.int32)
    query = jnp.asarray(rng.standard_normal((1, 128, 4, head_dim)), jnp.float32)
    key, value = jnp.asarray(rng.standard_normal((2, 1, 128, 2, head_dim)), jnp.float32)
    config = AttentionConfig(backend, segments=4, segment_length=70, interpret=True)

    def run(query, key, value):
        visible = see(jnp.asarray(positions), jnp.asarray(positions), segments, window, config)
        return attend(query, key, value, visible)

    got = jax.jit(run)(query, key, value)
    real = segments[0] > 0
    expected = slow_attention(query[0], key[0], value[0], segments[0], window)
    np.testing.assert_allclose(np.asarray(got)[0, real], expected[real], atol=3e-6)
    assert np.isfinite(got).all()


def test_a_kernel_is_given_no_gradient_beyond_the_end_of_a_segment():
    """Of a full row, a half-empty one whose second segment is missing, and an empty one."""
    segments = np.zeros((3, 12), np.int32)
    segments[0], segments[1, :5] = np.repeat([1, 2], [4, 8]), 1
    positions = np.zeros_like(segments)
    positions[0], positions[1, :5] = (*range(4), *range(8)), range(5)
    given = []

    def backward(*arrays):
        given.extend(np.asarray(x) for x in arrays[-3:])
        return backward_by_xla(*arrays)

    kernels = attention.Kernels(forward_by_xla, backward)
    rng = np.random.default_rng(0)
    query, key, value = jnp.asarray(rng.standard_normal((3, 3, 12, 2, 8)), jnp.float32)
    config = AttentionConfig("cudnn", segments=2, segment_length=8)
    visible = see(
        jnp.asarray(positions), jnp.asarray(positions), jnp.asarray(segments), None, config
    )
    output, pullback = jax.vjp(
        lambda *arrays: attention._cudnn(*arrays, visible, kernels), query, key, value
    )
    pullback(jnp.ones_like(output))
    outputs, log_sum_exp, gradient = given
    lengths = np.array([4, 8, 5, 0, 0, 0])
    inside = np.arange(8) < lengths[:, None]
    assert (gradient[inside] == 1).all() and (gradient[~inside] == 0).all()
    weights_of_zero = np.exp(-log_sum_exp.transpose(0, 2, 1))
    assert (weights_of_zero[inside] > 0).all() and (weights_of_zero[~inside] == 0).all()
    assert np.isfinite(outputs).all() and (outputs[inside] != 0).all()


def test_the_self_test_passes_what_is_right(cudnn_layout):
    assert self_test("cudnn_packed", jnp.bfloat16, 8, 2, 16) == []
    assert self_test("cudnn", jnp.bfloat16, 8, 2, 16) == []
    assert self_test("splash", jnp.float32, 4, 2, 128, length=384, interpret=True) == []


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_the_plain_one_keeps_segments_apart_to_the_bit_too(dtype):
    """In rows of several blocks of queries, gradients included."""
    assert self_test("xla", dtype, 8, 2, 16, length=384) == []


def one_key_too_few(query, key, value, mask, *rest, block):
    """In all blocks of queries but the first."""
    if key.shape[1] > attention.QUERY_BLOCK:
        mask = mask.at[:, :, attention.QUERY_BLOCK].set(False)
    return block(query, key, value, mask, *rest)


def leaks_in_blocks(query, key, value, mask, *rest, block):
    """A trace of the whole row in each output, within any tolerance."""
    trace = jnp.mean(value, axis=(1, 2, 3), keepdims=True)
    return block(query, key, value, mask, *rest) + 1e-6 * trace


@pytest.mark.parametrize("wanted", ["auto", "xla"])
def test_the_plain_one_is_proven_at_the_start_and_nothing_trains_where_it_fails(
    wanted, monkeypatch
):
    facts = dict(platform="cpu", dtype=jnp.float32, num_heads=4, num_kv_heads=2, head_dim=16)
    attention._tested_once.cache_clear()
    backend, why = choose_backend(wanted, **facts)
    assert (backend, why) == ("xla", "passed its self-test")
    block = attention._xla_block

    for broken in (one_key_too_few, leaks_in_blocks):
        monkeypatch.setattr(attention, "_xla_block", functools.partial(broken, block=block))
        attention._tested_once.cache_clear()
        with pytest.raises(ValueError, match="xla attention failed its self-test here.*not train"):
            choose_backend(wanted, **facts)
    monkeypatch.undo()
    attention._tested_once.cache_clear()


def noisy(amount=1e-3):
    """Kernels whose gradients differ from run to run as by another order of summing."""
    draws = np.random.default_rng(0)

    def backward(*arrays):
        def noise(shape):
            return amount * draws.standard_normal(shape).astype(np.float32)

        def one(x):
            drawn = jax.pure_callback(
                lambda: noise(x.shape), jax.ShapeDtypeStruct(x.shape, jnp.float32)
            )
            return (x * (1 + drawn)).astype(x.dtype)

        return tuple(one(x) for x in backward_by_xla(*arrays))

    return functools.partial(attention._cudnn, kernels=attention.Kernels(forward_by_xla, backward))


def test_a_kernel_that_is_not_the_same_from_run_to_run_is_told_and_used(monkeypatch):
    """cuDNN's gradients are so on GPUs, unless XLA is told to do without."""
    facts = dict(platform="gpu", dtype=jnp.bfloat16, num_heads=4, num_kv_heads=2, head_dim=16)
    loud = noisy(5e-3)
    monkeypatch.setattr(attention, "_cudnn", noisy())
    backend, why = choose_backend("auto", **facts)
    assert backend == "cudnn"
    assert "query gradients, key gradients, value gradients differ in the last bits" in why
    assert "xla_gpu_deterministic_ops" in why
    monkeypatch.setattr(attention, "_cudnn", functools.partial(leaks_a_little, kernel=noisy()))
    backend, why = choose_backend("auto", **facts)
    assert backend == "xla" and "see each other" in why
    # Within the tolerance still, but more than a rounding: a leak could hide in it.
    monkeypatch.setattr(attention, "_cudnn", loud)
    backend, why = choose_backend("auto", **facts)
    assert backend == "xla" and "differ from run to run by" in why


def leaks_across_segments(query, key, value, visible):
    """As if packed rows were one segment each."""
    positions = jnp.broadcast_to(jnp.arange(query.shape[1]), query.shape[:2])
    whole = see(positions, positions, None, visible.window, AttentionConfig())
    return attention._xla(query, key, value, whole)


def leaks_a_little(query, key, value, visible, kernel=XLA_IN_CUDNN_LAYOUT):
    """Right but for a trace of the whole row: within any tolerance, and still a leak."""
    trace = jnp.mean(value.astype(jnp.float32), axis=(1, 2), keepdims=True)
    output = kernel(query, key, value, visible)
    return output + (1e-3 * trace).astype(output.dtype)


def wrong_group(query, key, value, visible):
    """Key heads in another order: right for plain heads only when there is one."""
    return XLA_IN_CUDNN_LAYOUT(query, key[:, :, ::-1], value, visible)


def no_window(query, key, value, visible):
    import dataclasses

    return XLA_IN_CUDNN_LAYOUT(query, key, value, dataclasses.replace(visible, window=None))


@jax.custom_vjp
def doubled_gradient(x):
    return x


doubled_gradient.defvjp(lambda x: (x, None), lambda _, g: (2 * g,))


def wrong_gradient(query, key, value, visible):
    return XLA_IN_CUDNN_LAYOUT(query, doubled_gradient(key), value, visible)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (leaks_across_segments, "off by"),
        (leaks_a_little, "see each other"),
        (wrong_group, "off by"),
        (no_window, "window 36: .*off by"),
        (wrong_gradient, "key gradients are off by"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_self_test_catches_what_is_wrong(broken, message, monkeypatch):
    monkeypatch.setattr(attention, "_cudnn", broken)
    with pytest.raises(ValueError, match=message):
        self_test("cudnn", jnp.bfloat16, 4, 2, 16)
    # Asked for by name it refuses to run; left to choose, the plain one is taken, and it is said.
    facts = dict(platform="gpu", dtype=jnp.bfloat16, num_heads=4, num_kv_heads=2, head_dim=16)
    with pytest.raises(
        ValueError, match='failed its self-test.*Set train.attention="auto", or "xla"'
    ):
        choose_backend("cudnn", **facts)
    backend, why = choose_backend("auto", **facts)
    assert backend == "xla" and re.search(message, why)


def test_a_kernel_that_cannot_run_here_is_not_used():
    facts = dict(dtype=jnp.bfloat16, num_heads=4, num_kv_heads=2, head_dim=128)
    backend, why = choose_backend("auto", platform="gpu", **facts)  # there is no GPU
    assert backend == "xla" and "failed its self-test" in why
    assert choose_backend("auto", platform="cpu", **facts)[0] == "xla"
    with pytest.raises(ValueError, match="does not run on cpu"):
        choose_backend("splash", platform="cpu", **facts)


def test_what_a_backend_cannot_compute_is_told(cudnn_layout, monkeypatch):
    facts = dict(dtype=jnp.float32, num_heads=4, num_kv_heads=2, head_dim=64)
    assert "16 bits" in choose_backend("auto", platform="gpu", **facts)[1]
    assert "heads of a multiple of 128" in choose_backend("auto", platform="tpu", **facts)[1]
    wide = facts | {"head_dim": 128, "row_lengths": [256, 96]}
    assert (
        "choose such a batch.sequence_length" in choose_backend("auto", platform="tpu", **wide)[1]
    )
    facts["dtype"] = jnp.bfloat16
    monkeypatch.setattr(attention.jax, "__version_info__", (0, 11, 1))
    chosen = choose_backend("auto", platform="gpu", **facts)
    assert chosen == ("cudnn_packed", "passed its self-test")
    monkeypatch.setattr(attention.jax, "__version_info__", (0, 11, 0))
    backend, why = choose_backend("auto", platform="gpu", **facts)
    assert backend == "cudnn"
    assert re.fullmatch("passed its self-test; JAX .* in the wrong places", why)
    with pytest.raises(ValueError, match="in the wrong places"):
        choose_backend("cudnn_packed", platform="gpu", **facts)
    monkeypatch.setattr(attention.jax, "__version_info__", attention.UNKNOWN_JAX)
    backend, why = choose_backend("auto", platform="gpu", **facts)
    assert backend == "xla" and "as JAX has it before 0.13" in why


@pytest.mark.parametrize("backend", ["splash", "cudnn_packed", "cudnn"])
def test_kernels_run_on_each_device_of_a_mesh(backend, cudnn_layout):
    mesh = parallel.make_mesh(parallel.MeshConfig(2, 1, 2), jax.devices()[:4])
    rng = np.random.default_rng(0)
    # Rows are cut in different ways, so that no device may use the lengths of another.
    segments, positions = np.zeros((2, 2, 128), np.int32)
    for row, sizes in enumerate(((64, 64), (30, 98))):
        segments[row] = np.repeat([1, 2], sizes)
        positions[row] = np.concatenate([np.arange(size) for size in sizes])
    query = rng.standard_normal((2, 128, 4, 128)).astype(np.float32)
    key, value = rng.standard_normal((2, 2, 128, 2, 128)).astype(np.float32)

    def run(config, *arrays):
        visible = see(positions, positions, jnp.asarray(segments), None, config)
        return jnp.sum(attend(*arrays, visible) ** 2)

    expected = jax.jit(jax.grad(functools.partial(run, AttentionConfig())))(query, key, value)
    config = AttentionConfig(backend, 2, 128, interpret=True)
    with jax.set_mesh(mesh):
        placed = [
            parallel.put(x, mesh, parallel.BATCH_AXES, None, "tensor") for x in (query, key, value)
        ]
        got = jax.jit(jax.grad(functools.partial(run, config)))(*placed)
    np.testing.assert_allclose(got, expected, atol=2e-4)
