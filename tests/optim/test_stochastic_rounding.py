"""Parameters in few bits and nothing beside them: the mean of the writes is right, draws are keyed, nothing stalls."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx

import lowbit_jax as lb
from lowbit_jax.optim.sixteen_bit import on_grid_of

DTYPES = ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"]


def neighbors(x: float, dtype: str) -> tuple[float, float]:
    """The two values of the dtype around x."""
    codes = np.arange(2 ** (8 * np.dtype(dtype).itemsize), dtype=f"uint{8 * np.dtype(dtype).itemsize}")
    with np.errstate(all="ignore"):
        values = codes.view(dtype).astype(np.float64)
    values = np.unique(values[np.isfinite(values)])
    at = np.searchsorted(values, x, side="right")
    return values[at - 1], values[at]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("x", [1.003, -0.77123, 3e-5, 5.1])
def test_writes_are_unbiased_and_adjacent(dtype, x):
    """Mean of 100,000 draws within 5 standard errors; only the two neighbors occur."""
    n = 100_000
    x = np.float32(x)
    draws = np.asarray(jax.jit(on_grid_of, static_argnums=1)(jnp.full(n, x), dtype, jax.random.key(1)), np.float64)
    low, high = neighbors(float(x), dtype)
    assert set(np.unique(draws)) <= {low, high}
    p = (x - low) / (high - low)
    deviation = (high - low) * np.sqrt(p * (1 - p) / n)
    assert abs(draws.mean() - x) <= 5 * deviation + 1e-12


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_of_the_dtype_stay(dtype):
    x = np.random.default_rng(0).normal(size=1000).astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(on_grid_of(jnp.asarray(x), dtype, jax.random.key(0)), x)


def repeated(tx, params, grads, steps):
    def step(carry, _):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (lb.optim.apply_updates(params, updates), state), None

    return jax.jit(lambda c: jax.lax.scan(step, c, length=steps)[0])((params, tx.init(params)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nearest_rounding_stalls_where_stochastic_does_not(dtype):
    """400 steps of a quarter of half a unit in the last place: nearest stays at 1, stochastic arrives on average."""
    unit = float(ml_dtypes.finfo(dtype).eps)
    size, steps = unit / 8, 400
    params, grads = {"w": jnp.ones(4096, dtype)}, {"w": jnp.full(4096, -size)}
    nearest, _ = repeated(optax.sgd(1.0), params, grads, steps)
    np.testing.assert_array_equal(np.asarray(nearest["w"], np.float64), 1.0)
    moved, _ = repeated(lb.optim.stochastic_rounding(optax.sgd(1.0)), params, grads, steps)
    mean = np.asarray(moved["w"], np.float64).mean()
    spread = np.asarray(moved["w"], np.float64).std() / np.sqrt(4096)
    assert abs(mean - (1 + steps * size)) <= 5 * spread + 1e-3 * steps * size


@pytest.mark.parametrize("packed", [False, True], ids=["array", "packed"])
@pytest.mark.parametrize("name", ["int8", "ternary", "e4m3"])
def test_unbiased_on_a_grid(name, packed):
    """Steps of a hundredth of a step of the grid, well inside its range: the mean arrives within 5 standard errors,
    and every value is on the grid."""
    steps = 16 if name == "ternary" else 64  # few reach the upper end from the lower one
    fmt = lb.formats.get(name)
    quantizer = lb.optim.landing.param_quantizer(fmt, "test")
    rng = np.random.default_rng(0)
    w = rng.choice([-0.5, 0.5, 0.0], size=(2048, 8)).astype(np.float32)
    w[0] = 1.0  # holds the scale of each column
    if name == "ternary":
        quantizer = lb.Quantizer(format=fmt, tiling=lb.scaling.PerRow(), fit=lb.scaling.absmax)
        w[1:] = -1.0
    kept = quantizer.quantize(jnp.asarray(w), axis=-2)
    start = np.asarray(kept.dequantize())
    scale = float(kept.scales[0].reshape(-1)[0])
    step = scale * 0.01 * (8 if name == "e4m3" else 1)
    grads = np.full_like(w, -step)
    grads[0] = 0.0
    tx = lb.optim.stochastic_rounding(optax.sgd(1.0), None if packed else quantizer, refit=False)
    params = {"w": kept if packed else jnp.asarray(start)}
    moved, state = repeated(tx, params, {"w": jnp.asarray(grads)}, steps)
    found = np.asarray(lb.optim.unpacked(moved)["w"], np.float64)
    np.testing.assert_array_equal(found[0], start[0])
    u = found / scale
    np.testing.assert_allclose(u, np.asarray(lb.rounding.nearest(jnp.asarray(u, jnp.float32), fmt)), atol=1e-5)
    change = (found - start)[1:].astype(np.float64)
    assert abs(change.mean() - steps * step) <= 5 * change.std() / np.sqrt(change.size)
    if packed:
        assert jax.tree.structure(moved) == jax.tree.structure(params)
        assert not any(leaf.dtype == jnp.float32 and leaf.size > 64 for leaf in jax.tree.leaves((moved, state)))


@pytest.mark.parametrize("name", ["int8", "ternary", "e4m3"])
@pytest.mark.parametrize("packed", [False, True], ids=["array", "packed"])
def test_no_gradient_no_motion(name, packed):
    """Steps of zero leave every bit where it was, with scales that are fitted anew too.

    Arrays get there with their first step: what is no grid of the format at `init` is put on one."""
    quantizer = lb.optim.landing.param_quantizer(lb.formats.get(name), "test")
    kept = quantizer.quantize(jax.random.normal(jax.random.key(0), (64, 32)), axis=-2)
    params = {"w": kept if packed else kept.dequantize()}
    tx = lb.optim.stochastic_rounding(optax.sgd(1.0), None if packed else quantizer)
    moved, _ = repeated(tx, params, {"w": jnp.zeros((64, 32))}, 20)
    if packed:
        jax.tree.map(np.testing.assert_array_equal, moved, params)
    else:
        first, _ = repeated(tx, params, {"w": jnp.zeros((64, 32))}, 1)
        np.testing.assert_allclose(moved["w"], first["w"], rtol=3e-7)


def test_a_refitted_scale_follows_a_growing_weight():
    params = {"w": jnp.full((16, 4), 0.1).at[0].set(1.0)}
    grads = {"w": jnp.zeros((16, 4)).at[0].set(-1.0)}
    moved, state = repeated(lb.optim.stochastic_rounding(optax.sgd(1.0), lb.formats.INT8), params, grads, 3)
    np.testing.assert_allclose(moved["w"][0], 4.0, rtol=1e-6)
    stays, _ = repeated(lb.optim.stochastic_rounding(optax.sgd(1.0), lb.formats.INT8, refit=False), params, grads, 3)
    np.testing.assert_allclose(stays["w"][0], 1.0, rtol=1e-6)


def test_the_draw_depends_on_key_step_and_path_alone():
    one = {"a": jnp.ones(512, jnp.bfloat16), "z": {"b": jnp.ones(512, jnp.bfloat16)}}
    grads = jax.tree.map(lambda p: jnp.full(p.shape, -(2.0**-10)), one)
    tx = lambda key: lb.optim.stochastic_rounding(optax.sgd(1.0), key=key)
    first, _ = repeated(tx(0), one, grads, 3)
    for key in (0, jax.random.key(0), jax.random.PRNGKey(0)):
        jax.tree.map(np.testing.assert_array_equal, repeated(tx(key), one, grads, 3)[0], first)
    assert not jnp.array_equal(repeated(tx(1), one, grads, 3)[0]["a"], first["a"])
    assert not jnp.array_equal(first["a"], first["z"]["b"]), "paths draw by themselves"
    alone = {"z": one["z"]}
    np.testing.assert_array_equal(repeated(tx(0), alone, {"z": grads["z"]}, 3)[0]["z"]["b"], first["z"]["b"])
    halfway, state = repeated(tx(0), one, grads, 2)
    updates, _ = tx(0).update(grads, state, halfway)
    jax.tree.map(np.testing.assert_array_equal, lb.optim.apply_updates(halfway, updates), first)


@pytest.mark.parametrize("param_format", [None, lb.formats.INT8])
def test_same_draws_in_variables_of_nnx_and_out_of_them(param_format):
    """`nnx.Optimizer` makes the state of variables and steps on arrays; by hand both are variables, or arrays."""
    half = jnp.bfloat16
    model = nnx.Linear(64, 32, rngs=nnx.Rngs(0), param_dtype=half)
    model.value = nnx.Param(jnp.ones(16, half))  # a name, not the end of every path
    variables = nnx.state(model, nnx.Param)
    arrays = nnx.as_pure(variables)
    grads = jax.tree.map(lambda p: jnp.full_like(p, -(2.0**-10)), variables)
    tx = lb.optim.stochastic_rounding(optax.sgd(1.0), param_format)
    expected, state = repeated(tx, arrays, nnx.as_pure(grads), 2)
    by_hand, other = repeated(tx, variables, grads, 2)
    jax.tree.map(np.testing.assert_array_equal, nnx.as_pure(by_hand), expected)
    assert list(other.scales) == list(state.scales) == ([] if param_format is None else ["kernel"])
    assert any(jnp.any(a != b) for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(arrays), strict=True))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    step = nnx.jit(lambda model, optimizer: optimizer.update(model, grads))
    for _ in range(2):
        step(model, optimizer)
    jax.tree.map(np.testing.assert_array_equal, nnx.as_pure(nnx.state(model, nnx.Param)), expected)


def test_same_draws_on_any_sharding():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    params, grads = {"w": jnp.ones((64, 32), jnp.bfloat16)}, {"w": jnp.full((64, 32), -(2.0**-10))}
    tx = lb.optim.stochastic_rounding(optax.sgd(1.0))
    expected, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    found, _ = jax.jit(tx.update)(jax.device_put(grads, rows), tx.init(params), jax.device_put(params, rows))
    np.testing.assert_array_equal(found["w"], expected["w"])


def test_bytes_of_parameters_and_state_without_a_master():
    """bfloat16 parameters, 8-bit Adam, no master copy: 2 + 2.03 bytes a parameter, by the compiler's account."""
    params = {"w": jnp.zeros((512, 1024), jnp.bfloat16)}
    tx = lb.optim.stochastic_rounding(lb.optim.adamw_low_bit(1e-3))
    state = jax.eval_shape(tx.init, params)
    step = jax.jit(lambda p, s, g: tx.update(g, s, p))
    memory = step.lower(params, state, params).compile().memory_analysis()
    assert memory.argument_size_in_bytes / (512 * 1024) <= 2 + 2.05 + 2  # parameters, state, gradients


def test_errors():
    sgd = optax.sgd(1.0)
    params = {"w": jnp.ones((4, 4), jnp.bfloat16)}
    with pytest.raises(ValueError, match="2,. keys at once.*Pass keys.0"):
        lb.optim.stochastic_rounding(sgd, key=jax.random.split(jax.random.key(0)))
    with pytest.raises(ValueError, match="keys at once"):
        lb.optim.stochastic_rounding(sgd, key=jax.random.split(jax.random.PRNGKey(0)))
    for bad in (None, "0", 1.5, True, jnp.ones(2)):
        with pytest.raises(TypeError, match="key"):
            lb.optim.stochastic_rounding(sgd, key=bad)
    with pytest.raises(ValueError, match="all 1 parameters are float32.*param_format"):
        lb.optim.stochastic_rounding(sgd).init({"w": jnp.ones((4, 4))})
    tx = lb.optim.stochastic_rounding(sgd)
    with pytest.raises(ValueError, match="got no parameters"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match="EmptyState|tuple.*its own `init`"):
        tx.update(params, sgd.init(params), params)
    with pytest.raises(ValueError, match="not among the parameters"):
        tx.update({"w": params["w"], "v": params["w"]}, tx.init(params), params)
    with pytest.raises(TypeError, match="'n' is int32"):
        tx.init({"n": jnp.arange(3)})


class TestStatesOfOthers:
    """A state knows its grid: another one would saturate the weights, or leave them off it."""

    params = {"w": jnp.linspace(-1, 1, 64 * 32).reshape(64, 32)}
    zeros = {"w": jnp.zeros((64, 32))}
    INT8 = lb.optim.stochastic_rounding(optax.sgd(1.0), lb.formats.INT8)

    @pytest.mark.parametrize("param_format", [lb.formats.INT4, lb.formats.E4M3])
    def test_another_grid(self, param_format):
        other = lb.optim.stochastic_rounding(optax.sgd(1.0), param_format)
        with pytest.raises(ValueError, match=r"keeps 'w' on the grid of int8.*, and this optimizer on the grid of"):
            other.update(self.zeros, self.INT8.init(self.params), self.params)

    def test_no_grid(self):
        half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), self.params)
        plain = lb.optim.stochastic_rounding(optax.sgd(1.0))
        with pytest.raises(ValueError, match=r"on the grid of int8.*, and this optimizer off any grid"):
            plain.update(self.zeros, self.INT8.init(half), half)
        with pytest.raises(ValueError, match=r"off any grid, and this optimizer on the grid of int8"):
            self.INT8.update(self.zeros, plain.init(half), half)

    def test_another_size(self):
        wide = {"w": jnp.ones((64, 48))}
        with pytest.raises(ValueError, match=r"scales of 'w' have the shapes .*32.* need .*48"):
            self.INT8.update(wide, self.INT8.init(self.params), wide)

    @pytest.mark.parametrize("at_init", [0.01, 0.0, 100.0])
    def test_weights_loaded_after_init(self, at_init):
        """The first step fits the scales to the weights that it gets."""
        state = self.INT8.init(jax.tree.map(lambda p: at_init * p, self.params))
        found, _ = jax.jit(self.INT8.update)(self.zeros, state, self.params)
        expected, _ = jax.jit(self.INT8.update)(self.zeros, self.INT8.init(self.params), self.params)
        np.testing.assert_array_equal(found["w"], expected["w"])
        assert float(jnp.abs(found["w"]).max()) < 1 / 127
