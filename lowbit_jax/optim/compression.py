"""Gradients exchanged in few bits, with what was rounded away added to the next step's.

    c_t = g_t + e_(t-1),    sent_t = decode(encode(c_t)),    e_t = c_t - sent_t        so that    sum(sent) + e = sum(g)

Transformations over a named axis: for the inside of `shard_map` or `pmap`, on each device's own gradients. What travels
are packed bytes and float32 scales, never an array of less than 8 bits an element.

A gradient that is not finite on any device makes the whole update NaN on all of them, so that a `skip_nonfinite` or a
loss scale around it sees it, and leaves the state as it was: codes have no infinity, and an error that once held one
would never send anything again. Under a loss scale divide by it first: errors are kept in units of the gradients.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from lowbit_jax.formats.catalogue import BINARY, INT8, MIDTREAD4
from lowbit_jax.optim import trees
from lowbit_jax.optim.nonfinite import all_finite, select
from lowbit_jax.optim.state_codecs import Blockwise, StateCodec
from lowbit_jax.scaling import mean_abs

COMPRESSORS: dict[str, StateCodec] = {
    "int8": Blockwise(INT8, 256),
    "int4": Blockwise(MIDTREAD4, 64),
    "sign": Blockwise(BINARY, 2048, mean_abs),
}


class CompressionState(NamedTuple):
    """error: what each device has yet to send, float32, with a leading axis for the device (length 1 on it)."""

    error: Any
    server_error: Any


class SignMomentumState(NamedTuple):
    """momentum: of the exchanged signs, equal on all devices (with `vote`: each device's own, leading axis 1)."""

    momentum: Any
    error: Any


class OneBitAdamState(NamedTuple):
    count: Array
    mu: Any
    nu: Any
    error: Any


def compressed_mean(
    axis_name: str,
    compressor: str | StateCodec = "int8",
    *,
    error_feedback: bool = True,
    two_hop: bool = False,
    axis_size: int | None = None,
) -> optax.GradientTransformation:
    """The mean of the gradients over `axis_name`, exchanged in few bits: first in the chain, in place of a pmean.

    compressor: "int8" (blocks of 256), "int4" (blocks of 64), "sign" (one bit, mean magnitude of blocks of 2048), or a
    codec. One hop gathers everybody's codes: (n - 1) times the packed gradient arrives at each device. `two_hop` (n =
    `axis_size`) sends each device the part it averages and gathers the averages, packed again: 2 (n - 1) / n times,
    with an error feedback of its own for the second packing. Blocks are no longer than what they are blocks of.
    The mean comes in the dtype of the gradients; what that rounding takes from it is fed back as well, so that what was
    sent and what is left still sum to the gradients (float16 saturates; the rest follows).
    The state's errors belong to a device: run `init` inside `shard_map` too, or on the outside with shapes from
    `jax.eval_shape`, and give the specs of `lb.optim.compression_specs(state, axis_name)`, and `check_vma=False`: that
    everybody gathered the same is not seen by its types.
    Source: Seide et al. 2014 (1-bit SGD); Karimireddy et al. 2019, arXiv:1901.09847; two hops with error feedback on
    both: Tang et al. 2021 (1-bit Adam), arXiv:2102.02888.
    Raises: ValueError for an unknown compressor, or `two_hop` without `axis_size`."""
    codec = _compressor(compressor, "compressed_mean")
    if two_hop and axis_size is None:
        raise ValueError("compressed_mean(two_hop=True) needs axis_size=, the number of devices of the axis.")

    def init(params):
        trees.check_floating(params, "compressed_mean", "parameter")
        error = _zeros(params) if error_feedback else None
        part = lambda p: jnp.zeros((1, _part(p.size, axis_size or 1)), jnp.float32)
        server = jax.tree.map(part, params) if two_hop and error_feedback else None
        return CompressionState(error, server)

    def update(updates, state, params=None):
        del params
        trees.check_floating(updates, "compressed_mean", "gradient")
        good = all_finite(updates, axis_name)
        local = jax.tree.map(lambda g: g.astype(jnp.float32), updates)
        if state.error is not None:
            trees.check_same_tree(local, jax.tree.map(lambda e: e[0], state.error), "compressed_mean",
                                  ("gradients", "errors"))  # fmt: skip
            local = jax.tree.map(lambda g, e: g + e[0], local, state.error)
        if two_hop:
            n = axis_size or 1
            server = state.server_error if error_feedback else jax.tree.map(lambda _: None, local)
            found = jax.tree.map(lambda c, s: _two_hop(c, s, codec, axis_name, n), local, server,
                                 is_leaf=lambda x: x is None)  # fmt: skip
        else:
            found = jax.tree.map(lambda c: (*_one_hop(c, codec, axis_name), None), local)
        mean, left, server = (jax.tree.map(lambda _, out, i=i: out[i], local, found) for i in range(3))
        if not error_feedback:
            return _or_nan(good, jax.tree.map(lambda m, g: m.astype(g.dtype), mean, updates)), state
        sent = jax.tree.map(lambda m, g: _saturated(m, g.dtype), mean, updates)
        error = jax.tree.map(lambda e, m, s: (e + (m - s.astype(jnp.float32)))[None], left, mean, sent)
        new = CompressionState(error, server if two_hop else None)
        return _or_nan(good, sent), select(good, new, state)

    return optax.GradientTransformation(init, update)


def sign_momentum(
    axis_name: str, beta: float = 0.9, *, vote: bool = False, block: int = 2048
) -> optax.GradientTransformation:
    """Momentum exchanged at one bit an element, with error feedback: the first moment of 1-bit Adam.

    m_i = beta m + (1 - beta) g_i on each device, and m = mean of the decoded sign(m_i + e_i) * scale. With `vote`
    (signum) each device keeps its own momentum, and the update is the sign that most devices have (0 when tied);
    nothing is fed back.
    Source: Tang et al. 2021, arXiv:2102.02888; Bernstein et al. 2018, arXiv:1810.05291 (majority vote)."""
    codec = Blockwise(BINARY, block, mean_abs)

    def init(params):
        trees.check_floating(params, "sign_momentum", "parameter")
        if vote:
            return SignMomentumState(_zeros(params), None)
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        return SignMomentumState(zeros, _zeros(params))

    def update(updates, state, params=None):
        del params
        trees.check_floating(updates, "sign_momentum", "gradient")
        good = all_finite(updates, axis_name)
        if vote:
            momentum = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g.astype(jnp.float32), state.momentum, updates)
            ballot = lambda m: jnp.sign(_gathered_sum(codec.encode(m[0]), codec, m[0].shape, axis_name, signs=True))
            return _or_nan(good, jax.tree.map(ballot, momentum)), select(good, SignMomentumState(momentum, None), state)
        mixed = jax.tree.map(lambda m, g, e: beta * m + (1 - beta) * g.astype(jnp.float32) + e[0],
                             state.momentum, updates, state.error)  # fmt: skip
        found = jax.tree.map(lambda c: _one_hop(c, codec, axis_name), mixed)
        momentum, left = (jax.tree.map(lambda _, out, i=i: out[i], mixed, found) for i in range(2))
        new = SignMomentumState(momentum, jax.tree.map(lambda e: e[None], left))
        return _or_nan(good, momentum), select(good, new, state)

    return optax.GradientTransformation(init, update)


def scale_by_one_bit_adam(
    axis_name: str, warmup_steps: int, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, *, block: int = 2048
) -> optax.GradientTransformation:
    """Adam whose first `warmup_steps` exchange full gradients; then the second moment stays, and only the signs of the
    first travel, with error feedback.

    Source: Tang et al. 2021, arXiv:2102.02888, algorithm 1 (one hop here; bias corrections kept, that of the second
    moment at the end of the warm-up). Raises: ValueError for a warm-up below 1 step."""
    if warmup_steps < 1:
        raise ValueError(
            f"scale_by_one_bit_adam(warmup_steps={warmup_steps}): the second moment needs at least 1 step."
        )
    codec = Blockwise(BINARY, block, mean_abs)

    def init(params):
        trees.check_floating(params, "scale_by_one_bit_adam", "parameter")
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        return OneBitAdamState(jnp.zeros((), jnp.int32), zeros, zeros, _zeros(params))

    def warm(grads, state):
        mean = jax.tree.map(lambda g: lax.pmean(g, axis_name), grads)
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, mean)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, mean)
        return mu, nu, state.error

    def frozen(grads, state):
        mixed = jax.tree.map(lambda m, g, e: b1 * m + (1 - b1) * g + e[0], state.mu, grads, state.error)
        found = jax.tree.map(lambda c: _one_hop(c, codec, axis_name), mixed)
        mu, left = (jax.tree.map(lambda _, out, i=i: out[i], mixed, found) for i in range(2))
        return mu, state.nu, jax.tree.map(lambda e: e[None], left)

    def update(updates, state, params=None):
        del params
        trees.check_floating(updates, "scale_by_one_bit_adam", "gradient")
        good = all_finite(updates, axis_name)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), updates)
        mu, nu, error = lax.cond(state.count < warmup_steps, warm, frozen, grads, state)
        count = state.count + 1
        first = 1 - b1 ** count.astype(jnp.float32)
        second = 1 - b2 ** jnp.minimum(count, warmup_steps).astype(jnp.float32)
        moved = jax.tree.map(lambda m, v: (m / first) / (jnp.sqrt(v / second) + eps), mu, nu)
        return _or_nan(good, moved), select(good, OneBitAdamState(count, mu, nu, error), state)

    return optax.GradientTransformation(init, update)


def compression_specs(state: Any, axis_name: str) -> Any:
    """Specs of such a state for `shard_map`: errors lie on their devices, the rest is the same everywhere."""
    kinds = (CompressionState, SignMomentumState, OneBitAdamState)

    def specs(node: Any) -> Any:
        if not isinstance(node, kinds):
            return jax.tree.map(lambda _: PartitionSpec(), node)
        own = {"error", "server_error"} | ({"momentum"} if getattr(node, "error", 0) is None else set())
        place = lambda field: PartitionSpec(axis_name) if field in own else PartitionSpec()
        return type(node)(**{f: jax.tree.map(lambda _, f=f: place(f), getattr(node, f)) for f in node._fields})

    return jax.tree.map(specs, state, is_leaf=lambda node: isinstance(node, kinds))


def _compressor(compressor: str | StateCodec, who: str) -> StateCodec:
    if isinstance(compressor, str):
        if compressor not in COMPRESSORS:
            raise ValueError(f"{who} has no compressor {compressor!r}; there are {', '.join(COMPRESSORS)}, and codecs.")
        return COMPRESSORS[compressor]
    return compressor


def _zeros(params: Any) -> Any:
    return jax.tree.map(lambda p: jnp.zeros((1, *p.shape), jnp.float32), params)


def _or_nan(good: Bool[Array, ""], updates: Any) -> Any:
    return jax.tree.map(lambda u: jnp.where(good, u, jnp.full_like(u, jnp.nan)), updates)


def _saturated(x: Float[Array, "*s"], dtype: Any) -> Array:
    """`x` in the dtype of the gradients, the largest finite value where it would be infinite."""
    largest = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -largest, largest).astype(dtype)


def _within(codec: StateCodec, size: int) -> StateCodec:
    """The codec with blocks of at most `size` elements: the rest of a longer one would be padding, which travels."""
    if isinstance(codec, Blockwise) and codec.block > size > 0:
        return dataclasses.replace(codec, block=size)
    return codec


def _part(size: int, devices: int) -> int:
    """Elements that each of the devices averages."""
    return -(-size // devices)


def _gathered_sum(
    parts: Any, codec: StateCodec, shape: tuple[int, ...], axis_name: str, *, signs: bool = False
) -> Array:
    gathered = jax.tree.map(lambda leaf: lax.all_gather(leaf, axis_name), parts)
    decoded = jax.vmap(lambda one: codec.decode(one, shape))(gathered)
    return jnp.sum(jnp.sign(decoded) if signs else decoded, axis=0)


def _encoded(encode: Callable[[Array], Any], x: Float[Array, "*s"]) -> Any:
    """`encode(x)`, done before it is decoded: together XLA's CPU compiler would encode anew for every element that is
    read (twenty times slower, also across an optimization barrier). So there it stands in a branch always taken."""
    if jax.default_backend() != "cpu" or x.size == 0:
        return encode(x)
    first = lax.bitcast_convert_type(x.reshape(-1)[0], jnp.int32)
    like = jax.eval_shape(encode, x)
    zeros = lambda x: jax.tree.map(lambda a: jnp.broadcast_to((x.reshape(-1)[0] * 0).astype(a.dtype), a.shape), like)
    return lax.cond(first & jnp.int32(0x7FFFFFFF) >= 0, encode, zeros, x)


def _one_hop(c: Float[Array, "*s"], codec: StateCodec, axis_name: str) -> tuple[Array, Array]:
    """(mean over the devices, what this device did not get across)."""
    codec = _within(codec, c.size)
    parts = _encoded(codec.encode, c)
    total = _gathered_sum(parts, codec, c.shape, axis_name)
    return total / lax.axis_size(axis_name), c - codec.decode(parts, c.shape)


def _two_hop(
    c: Float[Array, "*s"], server: Array | None, codec: StateCodec, axis_name: str, n: int
) -> tuple[Array, Array, Array | None]:
    """(mean, what this device did not get across, and what was lost when it packed the mean of its part)."""
    if lax.axis_size(axis_name) != n:
        raise ValueError(
            f"compressed_mean(axis_size={n}): the axis {axis_name!r} has {lax.axis_size(axis_name)} devices. Give that"
            " number."
        )
    length = _part(c.size, n)
    codec = _within(codec, length)
    real = (jnp.arange(n * length) < c.size).reshape(n, length)
    padded = n * length > c.size
    fill = lambda x, real: _filled(x, real, getattr(codec, "block", 1)) if padded else x
    rows = fill(jnp.pad(c.reshape(-1), (0, n * length - c.size)).reshape(n, length), real)
    parts = _encoded(jax.vmap(codec.encode), rows)
    sent = jax.vmap(lambda one: codec.decode(one, (length,)))(parts)
    arrived = jax.tree.map(lambda leaf: lax.all_to_all(leaf, axis_name, 0, 0), parts)
    mean = jnp.mean(jax.vmap(lambda one: codec.decode(one, (length,)))(arrived), axis=0)
    mean = mean if server is None else mean + server[0]
    own = real[lax.axis_index(axis_name)] if padded else jnp.ones((length,), bool)
    packed = _encoded(codec.encode, fill(mean, own))
    lost = jnp.where(own, mean - codec.decode(packed, (length,)), jnp.zeros_like(mean))
    gathered = jax.tree.map(lambda leaf: lax.all_gather(leaf, axis_name), packed)
    whole = jax.vmap(lambda one: codec.decode(one, (length,)))(gathered).reshape(-1)[: c.size].reshape(c.shape)
    left = (rows - sent).reshape(-1)[: c.size].reshape(c.shape)
    return whole, left, None if server is None else lost[None]


def _filled(x: Float[Array, "*rows n"], real: Bool[Array, "*rows n"], block: int) -> Float[Array, "*rows n"]:
    """`x` with what is padding replaced by the mean magnitude of the real elements of its block: it changes neither a
    scale that is a mean magnitude nor one that is the largest."""
    n = x.shape[-1]
    tiles = lambda a: jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, -n % block)]).reshape(*a.shape[:-1], -1, block)
    kept = real.astype(jnp.float32)
    total, count = jnp.sum(tiles(jnp.abs(x) * kept), axis=-1), jnp.sum(tiles(kept), axis=-1)
    mean = jnp.repeat(total / jnp.maximum(count, 1), block, axis=-1)[..., :n]
    return jnp.where(real, x, mean)
