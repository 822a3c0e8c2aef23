"""Static activation scales from several batches, and models that compute with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import lowbit_jax as lb

STATIC = lb.methods.get("static_integer")


def net():
    return nnx.Sequential(nnx.Linear(32, 16, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(16, 4, rngs=nnx.Rngs(1)))


def batches(count: int = 3):
    """Of different sizes and magnitudes."""
    return [2.0**n * jax.random.normal(jax.random.key(n), (8 + 4 * n, 32)) for n in range(count)]


def scales(model) -> list[float]:
    return [float(model.layers[i].dot_general.lhs_scale[...]) for i in (0, 2)]


def absmax(x) -> float:
    return float(np.abs(np.asarray(x, np.float64)).max() / 127)


@pytest.mark.parametrize("statistic, of", [("mean", np.mean), ("max", np.max)])
def test_scales_are_those_of_all_batches(statistic, of):
    """The second layer's by what reaches it in each batch, of a first layer fitted to that batch."""
    model = lb.quantize(net(), STATIC)
    assert lb.nn.calibrate_over(model, batches(), statistic=statistic) is model
    alone = [lb.calibrate(lb.quantize(net(), STATIC), x) for x in batches()]
    hidden = [nnx.relu(one.layers[0](x)) for one, x in zip(alone, batches(), strict=True)]
    expected = [of([absmax(x) for x in batches()]), of([absmax(h) for h in hidden])]
    np.testing.assert_allclose(scales(model), expected, rtol=1e-6)


def test_the_largest_is_that_of_the_batches_together():
    model = lb.nn.calibrate_over(lb.quantize(net(), STATIC), batches(), statistic="max")
    together = lb.calibrate(lb.quantize(net(), STATIC), jnp.concatenate(batches()))
    np.testing.assert_allclose(scales(model)[0], scales(together)[0], rtol=1e-6)


def test_the_model_computes_with_the_scales_that_it_holds():
    """y = s_x s_w sum round(x / s_x) round(w / s_w), in float64, whatever the batch at hand."""
    layer = lb.quantize(nnx.Linear(32, 16, use_bias=False, rngs=nnx.Rngs(0)), STATIC)
    lb.nn.calibrate_over(layer, batches())
    x, w = 3 * np.asarray(batches(1)[0], np.float64), np.asarray(layer.kernel[...], np.float64)
    held = float(layer.dot_general.lhs_scale[...])
    of_rows = np.abs(w).max(0) / 127
    expected = np.clip(np.round(x / held), -128, 127) @ np.round(w / of_rows) * of_rows * held
    found = layer(jnp.asarray(x, jnp.float32))
    off = np.abs(np.asarray(found) - expected).max(-1) > 1e-4  # a tie that float32 sees otherwise moves a row
    assert off.mean() <= 0.25 and np.abs(expected).max() > 0.5
    packed = lb.convert(layer)
    np.testing.assert_allclose(packed(jnp.asarray(x, jnp.float32)), found, atol=1e-5)


def test_a_batch_of_zeros_does_not_count():
    model, plain = (lb.quantize(net(), STATIC) for _ in range(2))
    lb.nn.calibrate_over(model, [*batches(), jnp.zeros((4, 32))])
    lb.nn.calibrate_over(plain, batches())
    assert scales(model)[0] == scales(plain)[0]
    before = scales(model)
    lb.nn.calibrate_over(model, [jnp.zeros((4, 32))])
    assert scales(model)[0] == before[0]


@pytest.mark.parametrize("fmt", ["int4", "midrise4"])
def test_zeros_fit_no_scale_on_any_grid(fmt):
    """On a grid with a zero the fit of zeros is 1, which is no scale of this layer."""
    side = lb.Quantizer(
        format=lb.formats.get(fmt), tiling=lb.scaling.PerTensor(), fit=lb.scaling.Learned(lb.scaling.absmax),
        estimator=lb.estimators.LSQ(),
    )  # fmt: skip
    recipe = lb.LinearRecipe(out=lb.Gemm(lhs=side))
    model = lb.quantize(nnx.Linear(32, 16, rngs=nnx.Rngs(0)), recipe)
    lb.calibrate(model, 5 * batches(1)[0])
    before = float(model.dot_general.lhs_scale[...])
    lb.calibrate(model, jnp.zeros((4, 32)))
    assert float(model.dot_general.lhs_scale[...]) == before != 1
    dense = lb.quantize(linen.Dense(16), recipe)
    variables = dense.init(jax.random.key(0), jnp.ones((4, 32)))
    variables["params"]["lhs_scale"] = jnp.float32(0.3)
    new = lb.calibrate(dense, variables, jnp.zeros((4, 32)))
    assert float(new["params"]["lhs_scale"]) == jnp.float32(0.3)


class TestLinen:
    """The same of a Linen model, whose layers are named alike by both."""

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            hidden = linen.relu(linen.Dense(16)(x))
            return linen.Dense(4)(hidden)

    def made(self):
        model = lb.quantize(self.Net(), STATIC)
        return model, model.init(jax.random.key(0), jnp.ones((2, 32)))

    @staticmethod
    def scales(variables):
        return [float(variables["params"][f"Dense_{i}"]["lhs_scale"]) for i in (0, 1)]

    @pytest.mark.parametrize("statistic, of", [("mean", np.mean), ("max", np.max)])
    def test_scales_are_those_of_all_batches(self, statistic, of):
        model, variables = self.made()
        new = lb.nn.calibrate_over(model, variables, batches(), statistic=statistic)
        alone = [self.scales(lb.calibrate(model, variables, x)) for x in batches()]
        np.testing.assert_allclose(self.scales(new), of(alone, axis=0), rtol=1e-6)
        np.testing.assert_allclose(self.scales(new)[0], of([absmax(x) for x in batches()]), rtol=1e-6)
        before = self.scales(variables)
        assert self.scales(new) != before and self.scales(variables) == before

    def test_a_batch_of_zeros_does_not_count(self):
        model, variables = self.made()
        plain = lb.nn.calibrate_over(model, variables, batches())
        with_zeros = lb.nn.calibrate_over(model, variables, [*batches(), jnp.zeros((4, 32))])
        assert self.scales(with_zeros)[0] == self.scales(plain)[0]
        only = lb.nn.calibrate_over(model, variables, [jnp.zeros((4, 32))])
        assert self.scales(only)[0] == self.scales(variables)[0]

    def test_a_float_model_and_layers_that_a_loop_shares(self):
        class Loop(linen.Module):
            @linen.compact
            def __call__(self, x):
                turn = lambda layer, x, _: (layer(x), None)
                shared = linen.scan(turn, variable_broadcast="params", split_rngs={"params": False}, length=3)
                return shared(linen.Dense(32), x, None)[0]

        model, floats = lb.quantize(Loop(), STATIC), Loop().init(jax.random.key(0), jnp.ones((2, 32)))
        new = lb.nn.calibrate_over(model, floats, batches(2))
        each = [lb.calibrate(model, floats, x)["params"]["Dense_0"]["lhs_scale"] for x in batches(2)]
        np.testing.assert_allclose(new["params"]["Dense_0"]["lhs_scale"], np.mean(each), rtol=1e-6)

    class Branches(linen.Module):
        """Two layers, of which the sum of the inputs chooses one."""

        how: str

        def setup(self):
            self.a, self.b = linen.Dense(16), linen.Dense(16)

        def __call__(self, x):
            if self.is_initializing():
                return self.a(x) + self.b(x)
            a, b, high = self.a, self.b, x.sum() > 0
            if self.how == "closure":
                return linen.cond(high, lambda _, x: b(x), lambda _, x: a(x), self, x)
            left, right = lambda m, x: m.a(x), lambda m, x: m.b(x)
            if self.how == "switch":
                return linen.switch(jnp.int32(high), [left, right], self, x)
            return linen.cond(high, right, left, self, x)

    @pytest.mark.parametrize("variables_of", ["quantized", "float"])
    @pytest.mark.parametrize("how", ["cond", "closure", "switch"])
    def test_layers_that_some_batches_do_not_run(self, how, variables_of):
        """Each layer's scale is the mean of what the batches fit that run it."""
        branches = self.Branches(how)
        model = lb.quantize(branches, STATIC)
        variables = (model if variables_of == "quantized" else branches).init(jax.random.key(0), jnp.ones((2, 32)))
        high, low = [jnp.abs(x) for x in batches()], [-2 * jnp.abs(x) for x in batches(2)]
        new = lb.nn.calibrate_over(model, variables, [*high, *low])["params"]
        np.testing.assert_allclose(new["b"]["lhs_scale"], np.mean([absmax(x) for x in high]), rtol=1e-6)
        np.testing.assert_allclose(new["a"]["lhs_scale"], np.mean([absmax(x) for x in low]), rtol=1e-6)
        with pytest.raises(ValueError, match="calibrate_over: no batch runs the layer 'a'.*Add a batch"):
            lb.nn.calibrate_over(model, variables, high)
        with pytest.raises(
            ValueError, match="lb.calibrate: these inputs do not run the layer 'b'.*calibrate_over with"
        ):
            lb.calibrate(model, variables, low[0])

    def test_bad_input(self):
        model, variables = self.made()
        with pytest.raises(ValueError, match="calibrate_over got no batches"):
            lb.nn.calibrate_over(model, variables, [])
        with pytest.raises(ValueError, match="calibrate_over: no activation scale is learned here"):
            lb.nn.calibrate_over(lb.quantize(self.Net()), variables, batches(1))


def test_arguments_by_name_and_what_is_no_array():
    class Two(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(32, 16, rngs=nnx.Rngs(0))

        def __call__(self, x, factors, double=False):
            return self.layer(x * factors[0]) * (2 if double else 1)

    model = lb.quantize(Two(), STATIC)
    lb.nn.calibrate_over(model, [{"x": x, "factors": [1.0, 2.0], "double": True} for x in batches()])
    np.testing.assert_allclose(
        float(model.layer.dot_general.lhs_scale[...]), np.mean([*map(absmax, batches())]), rtol=1e-6
    )
    lb.nn.calibrate_over(model, [(x, (2.0, 3.0)) for x in batches()])
    expected = 2 * np.mean([*map(absmax, batches())])
    np.testing.assert_allclose(float(model.layer.dot_general.lhs_scale[...]), expected, rtol=1e-6)


def test_batches_alike_are_compiled_once():
    traced = []

    class Counted(nnx.Linear):
        def __call__(self, x):
            traced.append(x.shape)
            return super().__call__(x)

    model = lb.quantize(nnx.Sequential(Counted(32, 16, rngs=nnx.Rngs(0))), STATIC)
    traced.clear()
    lb.nn.calibrate_over(model, [batches(1)[0]] * 5)
    assert len(traced) == 1


def test_percentiles():
    model = lb.quantize(nnx.Linear(32, 16, rngs=nnx.Rngs(0)), lb.methods.get("static_integer", percent=99.0))
    assert "learned, from Percentile(percent=99.0)" in str(lb.explain(model))
    x = batches(1)[0]
    lb.calibrate(model, x)
    expected = np.quantile(np.abs(np.asarray(x, np.float64)), 0.99) / 127
    np.testing.assert_allclose(float(model.dot_general.lhs_scale[...]), expected, rtol=1e-5)


def test_bad_input_sets_nothing():
    model = lb.quantize(net(), STATIC)
    before = scales(model)
    good = batches(1)[0]
    with pytest.raises(ValueError, match="calibrate_over: this call set no scale in .*layers/0"):
        lb.nn.calibrate_over(model, [good, good.at[0, 0].set(jnp.nan)])
    with pytest.raises(ValueError, match="calibrate_over got no batches"):
        lb.nn.calibrate_over(model, [])
    for one in (good, {"x": good}):
        with pytest.raises(TypeError, match="takes an iterable of batches"):
            lb.nn.calibrate_over(model, one)
    with pytest.raises(ValueError, match=r"statistic='median'\): it is 'mean' or 'max'"):
        lb.nn.calibrate_over(model, [good], statistic="median")
    with pytest.raises(ValueError, match="no activation scale is learned here"):
        lb.nn.calibrate_over(lb.quantize(net()), [good])
    with pytest.raises(TypeError, match=r"takes \(model, variables, batches\), and got 2 arguments"):
        lb.nn.calibrate_over(lb.quantize(linen.Dense(4), STATIC), [good])
    with pytest.raises(TypeError, match=r"takes \(model, batches\), and got 3 arguments"):
        lb.nn.calibrate_over(model, {}, [good])
    with pytest.raises(ValueError, match="that are being traced"):
        jax.jit(lambda x: lb.nn.calibrate_over(model, [x]))(good)
    for bits, percent in ((1, 100.0), (9, 100.0), (8, 0.0), (8, 101.0)):
        with pytest.raises(ValueError):
            lb.methods.get("static_integer", bits=bits, percent=percent)
    assert scales(model) == before
