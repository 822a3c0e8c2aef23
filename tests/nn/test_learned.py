"""Scales that are parameters: where they live, that they train, and calibration."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import errors, linen, nnx
from flax.traverse_util import flatten_dict

import lowbit_jax as lb
from lowbit_jax.nn.nnx import Scale

LSQ = lb.methods.get("lsq", bits=4)


def net():
    return nnx.Sequential(nnx.Linear(32, 16, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(16, 4, rngs=nnx.Rngs(1)))


def lsq_start(x):
    """2 E|x| / sqrt(Qp) with Qp = 7.5 (Esser et al. 2019, section 2.1, on half-integer levels)."""
    return 2 * np.abs(np.asarray(x, np.float64)).mean() / np.sqrt(7.5)


def test_nnx_scales_are_params_of_the_layer():
    model = lb.quantize(net(), LSQ)
    scales = {"/".join(map(str, p)): v for p, v in nnx.to_flat_state(nnx.state(model, Scale))}
    sides = ("lhs_scale", "rhs_scale")
    assert set(scales) == {f"layers/{i}/dot_general/{side}" for i in (0, 2) for side in sides}
    assert all(isinstance(v, nnx.Param) for v in scales.values())
    np.testing.assert_allclose(
        scales["layers/0/dot_general/rhs_scale"].get_value(), lsq_start(model.layers[0].kernel[...]), rtol=1e-6
    )
    paths = lambda model: {path for path, _ in nnx.to_flat_state(nnx.state(model))}
    assert paths(model) - paths(net()) == {tuple(int(p) if p.isdigit() else p for p in s.split("/")) for s in scales}


def test_nnx_training_moves_weights_and_scales(key):
    model = lb.quantize(net(), LSQ)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    x, target = jax.random.normal(key, (16, 32)), jnp.sin(jnp.arange(64.0)).reshape(16, 4)
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))

    @nnx.jit
    def step(model, optimizer):
        loss, gradient = nnx.value_and_grad(lambda model: jnp.mean((model(x) - target) ** 2))(model)
        optimizer.update(model, gradient)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before, nnx.state(model, nnx.Param))
    assert all(jax.tree.leaves(moved))


def test_calibration_fits_each_layer_to_what_reaches_it(key):
    model = lb.quantize(net(), LSQ)
    x = 5 * jax.random.normal(key, (64, 32))
    assert lb.calibrate(model, x) is model
    np.testing.assert_allclose(model.layers[0].dot_general.lhs_scale[...], lsq_start(x), rtol=1e-5)
    hidden = nnx.relu(model.layers[0](x))  # of the quantized, calibrated first layer
    np.testing.assert_allclose(model.layers[2].dot_general.lhs_scale[...], lsq_start(hidden), rtol=1e-5)


def test_calibration_of_parts_that_were_quantized_by_themselves(key):
    model = nnx.Sequential(*[lb.quantize(nnx.Linear(8, 8, rngs=nnx.Rngs(i)), LSQ) for i in range(2)])
    x = 5 * jax.random.normal(key, (64, 8))
    lb.calibrate(model, x)
    for layer, arrived in zip(model.layers, (x, model.layers[0](x)), strict=True):
        np.testing.assert_allclose(layer.dot_general.lhs_scale[...], lsq_start(arrived), rtol=1e-5)


class Stack(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.vmap(lambda rngs: nnx.Linear(8, 8, rngs=rngs))(rngs.split(3))

    def __call__(self, x, *, lax_scan=False):
        if lax_scan:
            graph, state = nnx.split(self.layers)
            return jax.lax.scan(lambda x, s: (nnx.merge(graph, s)(x), None), x, state)[0]
        return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


def test_calibration_of_stacked_layers(key):
    model = lb.quantize(Stack(nnx.Rngs(0)), LSQ)
    x = jax.random.normal(key, (64, 8)) * 3
    assert model.layers.dot_general.lhs_scale.shape == (3,)
    lb.calibrate(model, x)
    scales = model.layers.dot_general.lhs_scale[...]
    np.testing.assert_allclose(scales[0], lsq_start(x), rtol=1e-5)
    assert len(set(np.asarray(scales).tolist())) == 3


def test_calibration_that_is_lost_raises_and_changes_nothing(key):
    model = lb.quantize(Stack(nnx.Rngs(0)), LSQ)
    before = model.layers.dot_general.lhs_scale[...]
    with pytest.raises(ValueError, match="set no scale in 'layers'.*jax.lax.scan"):
        lb.calibrate(model, jax.random.normal(key, (4, 8)), lax_scan=True)
    np.testing.assert_array_equal(model.layers.dot_general.lhs_scale[...], before)


def test_calibration_without_learned_scales_raises(key):
    with pytest.raises(ValueError, match="no activation scale is learned"):
        lb.calibrate(lb.quantize(net()), jnp.ones((1, 32)))


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        hidden = linen.relu(linen.Dense(16)(x))
        return linen.Dense(4)(hidden)


GAUSSIAN_START = 2 * np.sqrt(2 / np.pi) / np.sqrt(7.5)
"""`lsq_start` of a unit Gaussian, whose E|x| is sqrt(2 / pi). From 256 rows of 16 draws it is known to 1.2 %."""


def test_linen_scales_are_params_and_start_whatever_the_data_at_init(key):
    model, x = lb.quantize(LinenNet(), LSQ), 5 * jax.random.normal(key, (64, 32))
    variables = jax.jit(model.init)(key, x)
    plain = jax.jit(LinenNet().init)(key, x)
    for name in ("Dense_0", "Dense_1"):
        layer = dict(variables["params"][name])
        scales = {side: layer.pop(side) for side in ("lhs_scale", "rhs_scale")}
        for leaf, expected in zip(jax.tree.leaves(layer), jax.tree.leaves(dict(plain["params"][name])), strict=True):
            np.testing.assert_allclose(leaf, expected, rtol=1e-5)  # one program is jitted, the other not
        np.testing.assert_allclose(scales["rhs_scale"], lsq_start(layer["kernel"]), rtol=1e-6)
        np.testing.assert_allclose(scales["lhs_scale"], GAUSSIAN_START, rtol=0.05)
    zeros = jax.jit(model.init)(key, 0 * x)
    jax.tree.map(np.testing.assert_array_equal, zeros, variables)


APART = dict(variable_axes={"params": 0}, split_rngs={"params": True})
SCAN = linen.scan(lambda layer, x, _: (layer(x), None), length=3, **APART)
ENSEMBLE = linen.vmap(lambda layer, x: SCAN(layer, x, None)[0], in_axes=None, axis_size=2, **APART)
LIFTS = {
    "scan": lambda _, x: SCAN(linen.Dense(8, name="d"), x, None)[0],
    "remat in scan": lambda _, x: linen.remat(SCAN)(linen.Dense(8, name="d"), x, None)[0],
    "remat_scan": lambda _, x: linen.remat_scan(linen.Dense, lengths=(2, 3))(8, name="d")(x),
    "vmap": lambda _, x: linen.vmap(linen.Dense, in_axes=None, axis_size=3, **APART)(8, name="d")(x),
    "vmap of scan": lambda _, x: ENSEMBLE(linen.Dense(8, name="d"), x),
    "jit and remat": lambda _, x: linen.jit(linen.remat(linen.Dense))(8, name="d")(x),
    "the same layer twice": lambda _, x: (lambda layer: SCAN(layer, SCAN(layer, x, None)[0], None)[0])(linen.Dense(8)),
}


class Lifted(linen.Module):
    """What a lifted transformation does, before a layer outside of it, and with draws of its own."""

    lift: str

    @linen.compact
    def __call__(self, x):
        return linen.Dense(4, name="head")(
            LIFTS[self.lift](self, x) + self.param("own", linen.initializers.normal(), ())
        )


@pytest.mark.parametrize("method", ["lsq", "pact"])
@pytest.mark.parametrize("lift", LIFTS)
def test_linen_parameters_start_as_in_the_float_model(lift, method, key):
    """For the same key, to the last bits of two compiled programs: a learned scale draws nothing.

    Eight bits, as sums of few products of coarse grids lie at ties, where the last bit decides."""
    model, x = Lifted(lift), jax.random.normal(key, (4, 8))
    plain = {"/".join(p): v for p, v in flatten_dict(model.init(key, x)["params"]).items()}
    quantized = lb.quantize(model, lb.methods.get(method, bits=8))
    variables = quantized.init(key, x)
    learned = {"/".join(p): v for p, v in flatten_dict(variables["params"]).items()}
    for name, value in plain.items():
        np.testing.assert_allclose(learned.pop(name), value, rtol=1e-5, err_msg=name)
    assert learned and all(name.endswith("_scale") for name in learned)
    _, again = quantized.apply(variables, x, mutable=True)
    jax.tree.map(np.testing.assert_array_equal, again["params"], variables["params"])
    fitted = lb.calibrate(quantized, variables, x)
    packed, held = lb.convert(quantized, fitted, x)
    np.testing.assert_allclose(packed.apply(held, x), quantized.apply(fitted, x), rtol=1e-4, atol=1e-4)


def test_scales_that_cannot_start_are_asked_for(key):
    """With `params` mutable and no key for them, as where a model keeps its statistics by `mutable=True`."""
    model, x = lb.quantize(LinenNet(), LSQ), jax.random.normal(key, (4, 32))
    with pytest.raises(ValueError, match=r"the layer 'Dense_0' has no .hs_scale.*lb\.calibrate"):
        model.apply(LinenNet().init(key, x), x, mutable=True)
    variables = model.init(key, x)
    variables["params"]["Dense_0"]["lhs_scale"] = jnp.ones((2,))
    with pytest.raises(errors.ScopeParamShapeError, match="lhs_scale"):
        model.apply(variables, x)


def test_linen_calibration(key):
    model, x = lb.quantize(LinenNet(), LSQ), jax.random.normal(key, (64, 32))
    variables = jax.jit(model.init)(key, x)
    new = lb.calibrate(model, variables, 3 * x)
    np.testing.assert_allclose(new["params"]["Dense_0"]["lhs_scale"], lsq_start(3 * x), rtol=1e-5)
    np.testing.assert_allclose(variables["params"]["Dense_0"]["lhs_scale"], GAUSSIAN_START, rtol=0.05)
    assert jax.tree.structure(new) == jax.tree.structure(variables)
    with pytest.raises(TypeError, match="Pass the inputs of one call"):
        lb.calibrate(model, variables)
    with pytest.raises(ValueError, match="no activation scale is learned"):
        quantized = lb.quantize(LinenNet())
        lb.calibrate(quantized, jax.jit(quantized.init)(key, x), x)


def test_learned_activation_scales_need_one_entry():
    quantizer = lb.Quantizer(fit=LSQ.out.lhs.fit, estimator=LSQ.out.lhs.estimator, tiling=lb.scaling.PerRow())
    with pytest.raises(ValueError, match="one entry for the tensor.*tiling=PerTensor"):
        lb.quantize(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), lb.LinearRecipe(out=lb.Gemm(lhs=quantizer)))


def test_a_float_model_gets_its_scales_from_calibration(key):
    model, x = lb.quantize(LinenNet(), LSQ), jax.random.normal(key, (64, 32))
    variables = jax.jit(LinenNet().init)(key, x)
    for run in (lambda: model.apply(variables, x), lambda: lb.convert(model, variables, x)):
        with pytest.raises(ValueError, match=r"the layer 'Dense_0' has no .hs_scale.*lb\.calibrate"):
            run()
    new = lb.calibrate(model, variables, x)
    layer = new["params"]["Dense_0"]
    np.testing.assert_allclose(layer["lhs_scale"], lsq_start(x), rtol=1e-5)
    np.testing.assert_allclose(layer["rhs_scale"], lsq_start(layer["kernel"]), rtol=1e-5)
    assert model.apply(new, x).shape == (64, 4)


class Step(linen.Module):
    @linen.compact
    def __call__(self, x, _=None):
        return linen.Dense(32)(x), None


SHARED = {
    "scan": (linen.scan, Step, (None,), dict(variable_broadcast="params", split_rngs={"params": False}, length=2)),
    "vmap": (linen.vmap, Step, (), dict(variable_axes={"params": None}, split_rngs={"params": False})),
}


@pytest.mark.parametrize("lift", SHARED)
def test_linen_layers_that_a_loop_shares(lift, key):
    """A map reports a scale for each row, and the mean of their E|x| is that of all; a scan, one for each turn."""
    transform, kind, more, options = SHARED[lift]
    model, x = lb.quantize(transform(kind, **options)(), LSQ), 3 * jax.random.normal(key, (8, 32))
    variables = jax.jit(model.init)(key, x, *more)
    new = lb.calibrate(model, variables, x, *more)
    (layer,) = new["params"].values()
    turns = [lsq_start(x)]
    if lift == "scan":
        step = lb.quantize(linen.Dense(32), LSQ)
        turns.append(lsq_start(step.apply({"params": dict(layer, lhs_scale=jnp.float32(turns[0]))}, x)))
    np.testing.assert_allclose(layer["lhs_scale"], np.mean(turns), rtol=1e-5)
    assert model.apply(new, x, *more)[0].shape == x.shape


class Twice(nnx.Module):
    """One layer, run twice; the second time on the first's outputs, ten times as large."""

    def __init__(self, turns):
        self.d, self.turns = nnx.Linear(32, 32, rngs=nnx.Rngs(0)), turns

    def __call__(self, x):
        return self.turns(self.d, x)


def nnx_loop(axis):
    step = lambda x, layer, _: 10 * layer(x)
    return lambda d, x: nnx.scan(step, in_axes=(nnx.Carry, axis, 0), out_axes=nnx.Carry)(x, d, jnp.arange(2))


class LinenTwice(linen.Module):
    turns: object

    @linen.compact
    def __call__(self, x):
        return self.turns(linen.Dense(32, name="d"), x)


def linen_loop(d, x):
    options = dict(variable_broadcast="params", split_rngs={"params": False}, length=2)
    return linen.scan(lambda d, x, _: (10 * d(x), None), **options)(d, x, None)[0]


def linen_lifted(d, x):
    again = linen.jit(lambda d, x: 10 * d(x))
    return again(d, linen.remat(lambda d, x: 10 * d(x))(d, x))


def mean_of_two_turns(x, kernel):
    layer = nnx.Linear(32, 32, kernel_init=lambda *_: kernel, rngs=nnx.Rngs(0))
    one = lb.quantize(layer, LSQ)
    one.dot_general.lhs_scale.set_value(jnp.float32(lsq_start(x)))
    return (lsq_start(x) + lsq_start(10 * one(x))) / 2


@pytest.mark.parametrize(
    "turns",
    [
        lambda d, x: 10 * d(10 * d(x)),
        nnx_loop(nnx.StateAxes({Scale: nnx.Carry, ...: None})),
        lambda d, x: nnx.fori_loop(0, 2, lambda _, c: (c[0], 10 * c[0](c[1])), (d, x))[1],
    ],
)
def test_nnx_layers_that_run_twice_get_the_mean(turns, key):
    model, x = lb.quantize(Twice(turns), LSQ), jax.random.normal(key, (64, 32))
    state = jax.tree.structure(nnx.state(model))
    lb.calibrate(model, x)
    np.testing.assert_allclose(model.d.dot_general.lhs_scale[...], mean_of_two_turns(x, model.d.kernel[...]), rtol=1e-5)
    assert jax.tree.structure(nnx.state(model)) == state


def test_an_nnx_loop_that_loses_the_scales_is_told_the_way_out(key):
    with pytest.raises(ValueError, match="no scale in 'd'.*axis None.*StateAxes"):
        lb.calibrate(lb.quantize(Twice(nnx_loop(None)), LSQ), jax.random.normal(key, (4, 32)))


def test_an_nnx_loop_that_loses_some_of_the_runs_is_told_the_way_out(key):
    turns = nnx_loop(None)
    model, x = lb.quantize(Twice(lambda d, x: turns(d, 10 * d(x))), LSQ), jax.random.normal(key, (4, 32))
    before = model.d.dot_general.lhs_scale[...]
    with pytest.raises(ValueError, match="no scale in 'd', or not from all of its runs.*axis None.*StateAxes"):
        lb.calibrate(model, x)
    np.testing.assert_array_equal(model.d.dot_general.lhs_scale[...], before)


def test_a_layer_mapped_over_the_batch_gets_the_mean_of_what_its_rows_fit(key):
    over_the_batch = nnx.vmap(lambda d, x: d(x), in_axes=(None, 0))
    model, x = lb.quantize(Twice(over_the_batch), LSQ), jax.random.normal(key, (4, 32))
    lb.calibrate(model, x)
    np.testing.assert_allclose(model.d.dot_general.lhs_scale[...], lsq_start(x), rtol=1e-5)
    with pytest.raises(ValueError, match="lb.calibrate: the layer 'd' runs inside.*closes over it"):
        lb.calibrate(lb.quantize(Twice(lambda d, x: jax.vmap(d)(x)), LSQ), x)


def test_nnx_calibration_inside_of_jit_is_refused(key):
    with pytest.raises(ValueError, match="lb.calibrate got .* being traced"):
        nnx.jit(lb.calibrate)(lb.quantize(net(), LSQ), jnp.ones((4, 32)))


@pytest.mark.parametrize("turns", [lambda d, x: 10 * d(10 * d(x)), linen_loop, linen_lifted])
def test_linen_layers_that_run_twice_get_the_mean(turns, key):
    model, x = lb.quantize(LinenTwice(turns), LSQ), jax.random.normal(key, (64, 32))
    variables = jax.jit(model.init)(key, x)
    new = lb.calibrate(model, variables, x)
    layer = new["params"]["d"]
    np.testing.assert_allclose(layer["lhs_scale"], mean_of_two_turns(x, layer["kernel"]), rtol=1e-5)
    assert jax.tree.structure(new) == jax.tree.structure(variables)


def test_a_stack_beside_a_loop_that_shares_a_layer(key):
    """Each layer of the stack keeps a scale of its own; that of the shared layer is a mean."""

    def turns(d, x):
        options = dict(variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        stack = linen.Dense(32, name="stack", parent=d.parent)
        return linen_loop(d, linen.scan(lambda s, x, _: (10 * s(x), None), **options)(stack, x, None)[0])

    model, x = lb.quantize(LinenTwice(turns), LSQ), jax.random.normal(key, (64, 32))
    new = lb.calibrate(model, jax.jit(model.init)(key, x), x)["params"]
    np.testing.assert_allclose(new["stack"]["lhs_scale"][0], lsq_start(x), rtol=1e-5)
    assert new["stack"]["lhs_scale"][1] > 5 * new["stack"]["lhs_scale"][0] and new["d"]["lhs_scale"].shape == ()


@pytest.mark.parametrize("lift", ["vmap", "scan"])
def test_learned_scales_of_a_linen_stack_on_another_axis_are_refused_by_name(lift, key):
    options = dict(variable_axes={"params": 1}, split_rngs={"params": True})

    def turns(d, x):
        if lift == "vmap":
            return linen.vmap(lambda d, x: d(x), in_axes=None, axis_size=3, **options)(d, x)
        return linen.scan(lambda d, x, _: (d(x), None), length=3, **options)(d, x, None)[0]

    with pytest.raises(ValueError, match="the layer 'd' .Dense. learns scales.*another axis than 0"):
        lb.quantize(LinenTwice(turns), LSQ).init(key, jnp.ones((2, 32)))


def test_an_axis_error_of_the_model_itself_stays_as_it_is(key):
    with pytest.raises(ValueError, match="^axis 1 is out of bounds for array of dimension 1"):
        lb.quantize(LinenTwice(lambda d, x: jnp.sum(d(x)[0], axis=1)), LSQ).init(key, jnp.ones((2, 32)))


def test_flax_tabulates_packed_models_with_learned_scales():
    """Its table, which a packed weight among the arguments of a method would end, with Flax's classes left changed."""
    model = lb.quantize(nnx.Linear(32, 16, rngs=nnx.Rngs(0)), LSQ)
    for form in (model, lb.convert(model)):
        assert "Scale" in nnx.tabulate(form, jnp.ones((2, 32)))
    assert nnx.Linear(32, 16, rngs=nnx.Rngs(0))(jnp.ones((2, 32))).shape == (2, 16)


def test_calibration_on_zeros_keeps_the_scales(key):
    model = lb.quantize(net(), LSQ)
    before = model.layers[0].dot_general.lhs_scale[...]
    lb.calibrate(model, jnp.zeros((4, 32)))
    np.testing.assert_array_equal(model.layers[0].dot_general.lhs_scale[...], before)
    quantized = lb.quantize(LinenNet(), LSQ)
    variables = jax.jit(quantized.init)(key, jnp.ones((4, 32)))
    new = lb.calibrate(quantized, variables, jnp.zeros((4, 32)))
    np.testing.assert_array_equal(new["params"]["Dense_0"]["lhs_scale"], variables["params"]["Dense_0"]["lhs_scale"])


@pytest.mark.parametrize("norm", ["WeightNorm", "SpectralNorm"])
def test_calibration_fits_the_weight_that_a_norm_makes(norm, key):
    """Its norm is 1, whatever the size of the kernel; the raw kernel, with its scale, stays."""
    x, large = jax.random.normal(key, (64, 32)), jax.nn.initializers.normal(10.0)
    kernel = large(key, (32, 8))
    made = kernel / (jnp.linalg.norm(kernel, axis=0, keepdims=True) if norm == "WeightNorm" else 1)
    layer = nnx.Linear(32, 8, kernel_init=lambda *_: kernel, rngs=nnx.Rngs(0))
    model = lb.quantize(getattr(nnx, norm)(layer, rngs=nnx.Rngs(0)), LSQ)
    lb.calibrate(model, x)
    np.testing.assert_array_equal(model.layer_instance.kernel[...], kernel)
    fitted = model.layer_instance.dot_general.rhs_scale[...]
    options = {} if norm == "WeightNorm" else {"update_stats": False}
    quantized = lb.quantize(getattr(linen, norm)(linen.Dense(8, kernel_init=lambda *_: kernel)), LSQ)
    variables = quantized.init(key, x, **options)
    variables["params"]["layer_instance"]["kernel"] = kernel  # init leaves the one that the norm made
    new = lb.calibrate(quantized, variables, x, **options)["params"]["layer_instance"]
    np.testing.assert_array_equal(new["kernel"], kernel)
    np.testing.assert_allclose(new["lhs_scale"], lsq_start(x), rtol=1e-5)
    if norm == "WeightNorm":
        np.testing.assert_allclose(fitted, lsq_start(made), rtol=1e-5)
        np.testing.assert_allclose(new["rhs_scale"], lsq_start(made), rtol=1e-5)
    else:  # one step of power iteration, from a random vector, finds the singular value to a factor
        largest = np.linalg.norm(np.asarray(kernel), 2)
        for scale in (fitted, new["rhs_scale"]):
            assert 1 / 1.01 < scale * largest / lsq_start(kernel) < 3


def test_calibration_leaves_statistics_and_keys():
    class Noisy(nnx.Module):
        def __init__(self, rngs):
            self.layer, self.norm = nnx.Linear(32, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.layer(self.drop(x)))

    original = Noisy(nnx.Rngs(0))
    model, before = lb.quantize(original, LSQ), jax.tree.map(jnp.copy, nnx.state(original))
    scale = model.layer.dot_general.lhs_scale[...]
    lb.calibrate(model, jnp.ones((4, 32)))
    assert model.layer.dot_general.lhs_scale[...] != scale
    is_key = lambda a: jnp.issubdtype(a.dtype, jax.dtypes.prng_key)
    same = lambda a, b: np.testing.assert_array_equal(*(jax.random.key_data(v) if is_key(v) else v for v in (a, b)))
    jax.tree.map(same, nnx.state(original), before)
