"""Where in a tree of arrays is the first value that is not finite?"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import core


def first_nonfinite(tree: Any) -> tuple[str, tuple[int, ...], complex] | None:
    """Path, index and value of the first NaN or infinity among the floating leaves of `tree`; None if there is none.

    Each leaf is looked at on its device. Raises: TypeError inside `jit`, where values are not known yet."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if isinstance(leaf, core.Tracer):
            raise TypeError(
                f"first_nonfinite: {jax.tree_util.keystr(path) or 'the array'} is traced, so its values are not known."
                " Call it outside jit; inside, lb.optim.skip_nonfinite leaves out such a step."
            )
        array = jnp.asarray(leaf)
        if not jnp.issubdtype(array.dtype, jnp.inexact):
            continue
        bad = ~jnp.isfinite(array.astype(jnp.float32) if array.dtype.itemsize < 4 else array)
        if bool(jnp.any(bad)):
            index = tuple(int(i) for i in np.unravel_index(int(jnp.argmax(bad)), bad.shape))
            value = array[index]
            return jax.tree_util.keystr(path), index, complex(value) if jnp.iscomplexobj(value) else float(value)
    return None


def check_finite(tree: Any, *, who: str = "check_finite") -> None:
    """Raises FloatingPointError when a floating leaf of `tree` (parameters, gradients) holds a NaN or infinity.

    The message starts with `who` (say where and at which step) and names path, index and value of the first one.
    Packed weights have more to check: `QTensor.validate`. Raises: TypeError inside `jit`."""
    found = first_nonfinite(tree)
    if found is None:
        return
    path, index, value = found
    raise FloatingPointError(
        f"{who}: {path or 'the array'} holds {value} at index {index}, the first value that is not finite. Look at the"
        " step that wrote it; lb.optim.skip_nonfinite leaves out steps whose gradients are not finite."
    )
