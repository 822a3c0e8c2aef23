"""The same numbers as Qwix and AQT, where they are installed (`pip install -e '.[peers]'`)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit_jax as lb
from lowbit_jax import methods

pytestmark = [  # they are written for other versions of JAX and Flax
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("lenient_dtypes"),
]


@pytest.fixture
def lenient_dtypes():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def layer_and_input():
    x = jax.random.normal(jax.random.key(0), (2, 64, 256))
    return nnx.Linear(256, 128, use_bias=False, rngs=nnx.Rngs(0)), x


@pytest.mark.parametrize(
    ("recipe", "rule"),
    [
        (methods.absmax_integer(8, preserve_max=False), dict(weight_qtype=jnp.int8, act_qtype=jnp.int8)),
        (methods.absmax_integer(4, preserve_max=False), dict(weight_qtype=jnp.int4, act_qtype=jnp.int4)),
        (
            methods.absmax_integer(4, preserve_max=False, activations=False, group=32),
            dict(weight_qtype=jnp.int4, tile_size=32),
        ),
        (methods.fp8("row"), dict(weight_qtype=jnp.float8_e4m3fn, act_qtype=jnp.float8_e4m3fn)),
        (methods.nf4(64, double_quantization=False), dict(weight_qtype="nf4", tile_size=64)),
    ],
    ids=["int8", "int4", "int4 weights in groups", "fp8", "nf4"],
)
def test_qwix(recipe, rule):
    qwix = pytest.importorskip("qwix")
    layer, x = layer_and_input()
    theirs = qwix.quantize_model(layer, qwix.QtProvider([qwix.QtRule(module_path=".*", **rule)]), x)
    wanted = np.asarray(theirs(x))
    np.testing.assert_allclose(lb.quantize(layer, recipe)(x), wanted, atol=2e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("bits", [8, 4])
def test_aqt(bits):
    """Its integers leave out the lowest one of two's complement."""
    config = pytest.importorskip("aqt.jax.v2.config")
    layer, x = layer_and_input()
    settings = config.config_v4(fwd_bits=bits, dlhs_bits=None, drhs_bits=None)
    product = config.set_context(settings, key=None, train_step=0)
    wanted = np.asarray(product(x, layer.kernel[...], (((2,), (0,)), ((), ()))))
    quantizer = lb.Quantizer(format=lb.formats.get(f"midtread{bits}"), fit=lb.scaling.absmax_edge)
    found = lb.quantize(layer, lb.LinearRecipe(out=lb.Gemm(lhs=quantizer, rhs=quantizer)))(x)
    np.testing.assert_allclose(found, wanted, atol=2e-6 * np.abs(wanted).max())
