import jax
import pytest


@pytest.fixture(autouse=True)
def usual_promotion():
    """Optax promotes implicitly, scalars above all; the strict rules of the other tests are for our own code."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
