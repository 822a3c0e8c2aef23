"""What is wrong with a call, said before anything is launched: who complains, the value, the rule, the way out."""

import math
from collections.abc import Iterable
from typing import Any, NoReturn

import jax.numpy as jnp
import numpy as np

MATRIX_DTYPES = (jnp.bfloat16, jnp.float16)
SCALE_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
OUT_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
MOST_ELEMENTS = (1 << 31) - 1


class NoKernel(NotImplementedError):
    """There is no kernel for this call; the XLA reference (`impl="xla"`) computes it."""


def fail(who: str, seen: str, way_out: str) -> NoReturn:
    raise ValueError(f"{who} {seen}. {way_out}.")


def check_bits(who: str, bits: int) -> None:
    """Raises: ValueError unless `bits` is an int from 1 to 8."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        fail(who, f"got bits={bits!r}", "Codes have 1 to 8 bits")


def check_array(who: str, name: str, x: Any) -> None:
    """Raises: TypeError for what has no shape and dtype."""
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise TypeError(f"{who} got {name} of type {type(x).__name__}; it takes arrays: pass jnp.asarray({name}).")


def check_matrix(who: str, name: str, x: Any, dtypes: tuple) -> tuple[int, int]:
    """(rows, columns) of a matrix of one of the dtypes.

    Raises: ValueError for other ranks or no elements, TypeError for other dtypes and what is no array."""
    check_array(who, name, x)
    if x.ndim != 2:
        fail(who, f"got {name} of shape {x.shape}", "It takes a matrix; merge leading axes, or use vmap")
    if x.dtype not in [jnp.dtype(d) for d in dtypes]:
        allowed = " or ".join(jnp.dtype(d).name for d in dtypes)
        raise TypeError(f"{who} got {name} of {x.dtype}; it takes {allowed}. Cast it first.")
    if 0 in x.shape:
        fail(
            who,
            f"got an empty {name}, shape {x.shape}",
            "There is nothing to compute; handle zero rows before the call",
        )
    return x.shape


def check_shape(who: str, name: str, x: Any, shape: tuple[int, ...], dtype: Any) -> None:
    """Raises: ValueError for another shape, TypeError for another dtype (or none of a tuple of them) or what is
    no array."""
    check_array(who, name, x)
    if tuple(x.shape) != shape:
        fail(who, f"got {name} of shape {tuple(x.shape)}; it takes {shape}", "Check the sizes of the operands")
    allowed = [jnp.dtype(d) for d in (dtype if isinstance(dtype, tuple) else (dtype,))]
    if x.dtype not in allowed:
        names = " or ".join(d.name for d in allowed)
        raise TypeError(f"{who} got {name} of {x.dtype}; it takes {names}. Cast it first.")


def check_number(who: str, name: str, value: Any) -> float:
    """The value as a float.

    Raises: TypeError for anything but a plain number, arrays and traced values among it."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(
            f"{who} got {name} of type {type(value).__name__}; it takes one plain number for the whole matrix."
            f" Pass float({name}), known before tracing."
        )
    return float(value)


def check_finite(who: str, name: str, value: Any) -> float:
    """`check_number` of one that is finite. Raises: ValueError for NaN and infinities."""
    number = check_number(who, name, value)
    if not math.isfinite(number):
        fail(who, f"got {name}={number}", "It is a finite number")
    return number


def check_choice(who: str, name: str, value: Any, choices: Iterable[str], note: str = "") -> None:
    """Raises: ValueError unless the value is one of these strings."""
    if not isinstance(value, str) or value not in choices:
        fail(who, f"got {name}={value!r}", f"It is one of {', '.join(choices)}{note}")


def check_out_dtype(who: str, dtype: Any, name: str = "out_dtype", dtypes: tuple = OUT_DTYPES) -> np.dtype:
    """Raises: TypeError unless it is one of `dtypes`."""
    allowed = {jnp.dtype(d).name: jnp.dtype(d) for d in dtypes}
    try:
        seen = jnp.dtype(dtype).name
    except TypeError:
        seen = repr(dtype)
    if seen not in allowed:
        raise TypeError(f"{who} got {name}={seen}; it returns {', '.join(allowed)}.")
    return allowed[seen]


def check_integer(who: str, name: str, value: Any) -> None:
    """Raises: TypeError for anything but an integer."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{who} got {name}={value!r}, a {type(value).__name__}; it takes an integer, or None.")


def check_kind(who: str, name: str, value: Any, kind: type) -> None:
    """Raises: TypeError unless the value is a `kind`."""
    if not isinstance(value, kind):
        raise TypeError(
            f"{who} got {name} of type {type(value).__name__}; it takes a {kind.__name__} ({kind.__name__}(**fields)"
            " makes one of a dict)."
        )


def check_offsets(who: str, **shapes: tuple[int, ...]) -> None:
    """Raises: ValueError for an array of more elements than the 32-bit offsets of these kernels reach."""
    for name, shape in shapes.items():
        if math.prod(shape) > MOST_ELEMENTS:
            fail(
                who,
                f"got {name} of shape {tuple(shape)}, {math.prod(shape)} elements; kernels count up to {MOST_ELEMENTS}",
                "Cut the product along its rows or output channels, or pass impl='xla'",
            )


def check_group(who: str, group: int | None, k: int) -> int:
    """The length of a group, `k` for None.

    Raises: ValueError unless it is a multiple of 32 that divides k, TypeError unless it is an integer."""
    if group is None:
        return k
    check_integer(who, "group", group)
    if group < 32 or group % 32 or k % group:
        legal = [g for g in (32, 64, 128, 256) if k % g == 0]
        fail(who, f"got group={group} for K={k}", f"A group is a multiple of 32 that divides K (here {legal}), or None")
    return group
