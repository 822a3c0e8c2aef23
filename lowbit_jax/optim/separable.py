"""Whether an optimizer treats each element by itself: read off the operations that its update is made of."""

from collections.abc import Iterator
from typing import Any

import jax
import optax

from lowbit_jax.optim import trees

# Operations that join elements, or that make others of them when given a part of an array (random draws).
_JOINING = (
    "reduce_",
    "arg",
    "dot_general",
    "conv_general",
    "cum",
    "sort",
    "gather",
    "scatter",
    "dynamic_",
    "rev",
    "fft",
)
_JOINING += ("random_", "threefry", "rng_", "psum", "pmax", "pmin", "all_", "ppermute", "custom_call", "pallas_call")
_JOINING += ("eigh", "svd", "qr", "cholesky", "lu", "triangular_solve", "top_k", "transpose", "concatenate", "iota")


def joining_operation(tx: optax.GradientTransformation, params: Any) -> str | None:
    """The name of an operation by which `tx` lets elements act on one another, such as the sum of a norm; None where it
    has none, and so may run on parts of an array. Traced on the shapes of the parameters; nothing is computed."""
    params = jax.eval_shape(trees.float32, params)
    state = jax.eval_shape(tx.init, params)
    update = optax.with_extra_args_support(tx).update
    jaxpr = jax.make_jaxpr(update)(params, state, params)
    return next((name for name in _operations(jaxpr.jaxpr) if name.startswith(_JOINING)), None)


def _operations(jaxpr: Any) -> Iterator[str]:
    for equation in jaxpr.eqns:
        inner = [v for p in equation.params.values() for v in (p if isinstance(p, tuple | list) else (p,))]
        inner = [getattr(v, "jaxpr", v) for v in inner if hasattr(getattr(v, "jaxpr", v), "eqns")]
        if not inner:
            yield equation.primitive.name
        for other in inner:
            yield from _operations(other)
