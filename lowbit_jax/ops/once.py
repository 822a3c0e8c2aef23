"""A product that keeps codes for its backward has no second derivatives: codes carry no tangent."""

import jax


@jax.custom_jvp
def once_differentiable(x):
    """The arrays of x, for the forward and backward rules of such a product.

    Raises: NotImplementedError when they are differentiated again, where the answer would silently be zero."""
    return x


@once_differentiable.defjvp
def _refuse(primals, tangents):
    raise NotImplementedError(
        "lb.dot_general: a second derivative (a Hessian, a gradient penalty) through a product that keeps codes for"
        " its backward, which carry no tangent. Use recipe.with_implementation('reference') for it; a recipe whose"
        " backward products fold scales, and a model of lb.nn.keep_codes, have no second derivatives at all."
    )
