"""The first value that is not finite, found by path and index."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowbit_jax as lb


def tree(value=1.0, dtype=jnp.float32):
    bad = np.ones((3, 4), dtype)
    bad[1, 2] = bad[2, 0] = value
    return {"a": {"kernel": jnp.ones((2,))}, "b": [np.arange(3), {"bias": jnp.asarray(bad)}], "c": None}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float8_e5m2])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_names_path_index_and_value(value, dtype):
    found = lb.scaling.first_nonfinite(tree(value, dtype))
    assert found is not None and found[:2] == ("['b'][1]['bias']", (1, 2))
    np.testing.assert_array_equal(found[2], value)
    with pytest.raises(FloatingPointError, match=r"step 7: \['b'\]\[1\]\['bias'\] holds -?(inf|nan) at index \(1, 2\)"):
        lb.check_finite(tree(value, dtype), who="step 7")


def test_finite_trees_pass():
    lb.check_finite(tree())
    lb.check_finite({})
    lb.check_finite(jnp.zeros((0, 3)))
    assert lb.scaling.first_nonfinite(tree()) is None


def test_traced_values_are_not_known():
    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(lambda x: lb.check_finite(x))(jnp.ones(2))
