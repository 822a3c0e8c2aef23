"""Linen: `convert` and `prepare` refuse a layer that does not receive its weight as it is stored, and no other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import lowbit_jax as lb

WEIGHTS = lb.quest(4, activations=False)
VERBS = {"lb.convert": lb.convert, "lb.nn.prepare": lb.nn.prepare}


class Calling(nn.Module):
    """`body(self, x)` as a compact method."""

    body: object

    @nn.compact
    def __call__(self, x):
        return self.body(self, x)


def mapped(change, kind=nn.Dense, **options):
    change = functools.partial(jax.tree.map, change)
    return nn.map_variables(kind, "params", trans_in_fn=change, init=True, **options)


def through_bfloat16(w):
    return w.astype(jnp.bfloat16).astype(jnp.float32)


def stacked(axis, lift):
    """Eight square layers, whose stack looks alike on any axis."""
    options = dict(variable_axes={"params": axis}, split_rngs={"params": True})

    def body(_, x):
        if lift is nn.vmap:
            return nn.vmap(nn.Dense, in_axes=None, out_axes=0, axis_size=8, **options)(8, name="d")(x)
        step = lambda layer, x, _: (layer(x), None)
        return nn.scan(step, length=8, **options)(nn.Dense(8, name="d"), x, None)[0]

    return body


def ensemble(axis, of_scan=0, length=3):
    """A map, over `axis`, around a scan, whose trace lets the two axes of the stack change places."""
    options = dict(split_rngs={"params": True})
    step = lambda layer, x, _: (layer(x), None)
    tower = nn.scan(step, length=length, variable_axes={"params": of_scan}, **options)
    lift = dict(in_axes=None, axis_size=length, variable_axes={"params": axis}, **options)
    return lambda _, x: nn.vmap(lambda d, x: tower(d, x, None)[0], **lift)(nn.Dense(8, name="d"), x)


def twice(_, x):
    layer = nn.Einsum((8, 8), use_bias=False, name="d")
    return layer(layer(x, "bi,ij->bj"), "bj,ij->bi")


def variables_and_model(body, rules=None):
    x, model = jnp.ones((2, 8)), lb.quantize(Calling(body), WEIGHTS, rules=rules)
    return model, jax.eval_shape(model.init, jax.random.key(0), x), x


@pytest.mark.parametrize("who", VERBS)
@pytest.mark.parametrize(
    "body, words",
    [
        (lambda _, x: mapped(jnp.negative)(8, name="d")(x), "not receive its weight as it is stored.*by `neg`"),
        (lambda _, x: mapped(jnp.tanh)(8, name="d")(x), "by `tanh`"),
        (
            lambda _, x: mapped(lambda w: w.astype(jnp.bfloat16).astype(jnp.float32))(8, name="d")(x),
            "by `convert_element_type`",
        ),
        (lambda _, x: nn.remat(mapped(jnp.negative))(8, name="d")(x), "by `neg`"),
        (stacked(1, nn.vmap), "by `transpose`.*another axis than 0"),
        (stacked(1, nn.scan), "by `transpose`.*another axis than 0"),
        (ensemble(2, length=8), "by `transpose`.*another axis than 0"),
        (ensemble(0, of_scan=1, length=8), "by `transpose`.*another axis than 0"),
        (lambda _, x: mapped(jnp.transpose)(8, name="d")(x), "by `transpose`"),
        (twice, r"different axes of its weight \(\(0,\) and \(1,\)\)"),
    ],
)
def test_refused_by_name(who, body, words):
    model, variables, x = variables_and_model(body)
    with pytest.raises(ValueError, match=rf"^{who}: the layer 'd' .*{words}"):
        jax.eval_shape(lambda v: VERBS[who](model, v, x)[1], variables)


def test_a_mapped_table_of_an_embedding_is_refused():
    body = lambda _, x: nn.Dense(4, name="h")(mapped(jnp.negative, nn.Embed)(8, 8, name="d")(x.astype(int)))
    model, variables, x = variables_and_model(body, rules=[("d", WEIGHTS)])
    with pytest.raises(ValueError, match="^lb.convert: the layer 'd' .*by `neg`"):
        jax.eval_shape(lambda v: lb.convert(model, v, x)[1], variables)


def after_a_lift(_, x):
    """The parameters come out of the lifted call before they go into the second one."""
    layer = nn.Dense(8, name="d")
    x = nn.jit(lambda layer, x: layer(x))(layer, x)
    x, _ = nn.scan(lambda m, x, _: (m(x), None), variable_broadcast="params", length=2)(layer, x, None)
    return layer(nn.remat(lambda layer, x: layer(x))(layer, x))


def branches(module, x):
    one, two = nn.Dense(8, name="d"), nn.Dense(8, name="e")
    if module.is_initializing():
        return one(x) + two(x)
    x = nn.cond(x.sum() > 0, lambda _, x: one(x), lambda _, x: two(x), module, x)
    more = lambda m, c: c[0] < 2
    return nn.while_loop(more, lambda m, c: (c[0] + 1, one(c[1])), module, (jnp.int32(0), x), carry_variables=[])[1]


def boxed(_, x):
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    options = dict(variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=8)
    return nn.vmap(nn.Dense, metadata_params={nn.PARTITION_NAME: None}, **options)(8, kernel_init=init, name="d")(x)


def differentiated(_, x):
    layer = nn.Dense(8, name="d")
    y, back = nn.vjp(lambda m, x: m(x), layer, x)
    return y + back(y)[1]


@pytest.mark.parametrize(
    "body",
    [
        after_a_lift,
        branches,
        boxed,
        differentiated,
        stacked(0, nn.vmap),
        stacked(0, nn.scan),
        lambda _, x: mapped(lambda w: w)(8, name="d")(x),
        lambda _, x: nn.remat_scan(nn.Dense, lengths=(2, 4))(8, name="d")(x),
    ],
)
def test_lifts_that_hand_on_what_is_stored_are_taken(body):
    model, variables, x = variables_and_model(body)
    for verb in VERBS.values():
        packed, held = verb(model, jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), variables), x)
        assert jax.eval_shape(packed.apply, held, x).shape[-1] == 8


@pytest.mark.parametrize("layout", ["bitstream-le/1", "planes/1"])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_map_around_a_scan_gives_each_layer_its_own_codes(axis, layout, key):
    """Of nine layers, stacked three by three, which look alike in any order."""
    x, recipe = jax.random.normal(key, (2, 8)), lb.methods.get("absmax_integer", bits=4, group=4)
    model = lb.quantize(Calling(ensemble(axis)), recipe)
    variables = model.init(key, x)
    y = model.apply(variables, x)
    assert jnp.abs(y[0] - y[1]).max() > 0.1 * jnp.abs(y).max()
    for ready, held in (lb.convert(model, variables, x, layout=layout), lb.nn.prepare(model, variables, x)):
        np.testing.assert_allclose(ready.apply(held, x), y, rtol=0, atol=1e-5 * float(jnp.abs(y).max()))


@pytest.mark.parametrize("variables_of", ["quantized", "float"])
@pytest.mark.parametrize("side", ["lhs", "rhs"])
def test_a_mapped_scale_is_not_fitted(side, variables_of, key):
    """It would be mapped once more at its use; where the kernel alone is mapped, the scale is the one that is used."""
    learned = lb.methods.get("lsq", bits=4).out
    recipe = lb.LinearRecipe(out=lb.Gemm(lhs=learned.lhs, rhs=learned.rhs if side == "rhs" else None))
    x = 3 * jax.random.normal(key, (64, 8))

    def doubled(names):
        change = lambda path, a: 2 * a if path[-1].key in names else a
        mapped = dict(trans_in_fn=functools.partial(jax.tree_util.tree_map_with_path, change), init=True)
        return Calling(lambda _, x: nn.map_variables(nn.Dense, "params", **mapped)(8, name="d")(x))

    for names in (("kernel", "bias"), ("kernel", "bias", f"{side}_scale")):
        plain = doubled(names)
        model = lb.quantize(plain, recipe)
        variables = (model if variables_of == "quantized" else plain).init(key, x)
        if len(names) == 3:
            with pytest.raises(
                ValueError, match=f"^lb.calibrate: the layer 'd' .*its {side}_scale as .*by `mul`.*map_va"
            ):
                lb.calibrate(model, variables, x)
        else:
            new = lb.calibrate(model, variables, x)["params"]["d"]
            np.testing.assert_allclose(new["lhs_scale"], 2 * jnp.abs(x).mean() / jnp.sqrt(7.5), rtol=1e-5)
