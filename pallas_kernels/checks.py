"""What is wrong with a call, said before anything is launched: who complains, the value, the rule, the way out."""

from typing import Any, NoReturn

import jax.numpy as jnp

MATRIX_DTYPES = (jnp.bfloat16, jnp.float16)


class NoKernel(NotImplementedError):
    """There is no kernel for this call; the XLA reference (`impl="xla"`) computes it."""


def fail(who: str, seen: str, way_out: str) -> NoReturn:
    raise ValueError(f"{who} {seen}. {way_out}.")


def check_bits(who: str, bits: int) -> None:
    """Raises: ValueError unless `bits` is an int from 1 to 8."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        fail(who, f"got bits={bits!r}", "Codes have 1 to 8 bits")


def check_matrix(who: str, name: str, x: Any, dtypes: tuple) -> tuple[int, int]:
    """(rows, columns) of a matrix of one of the dtypes.

    Raises: ValueError for other ranks or no elements, TypeError for other dtypes."""
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
    """Raises: ValueError for another shape, TypeError for another dtype."""
    if tuple(x.shape) != shape:
        fail(who, f"got {name} of shape {tuple(x.shape)}; it takes {shape}", "Check the sizes of the operands")
    if x.dtype != jnp.dtype(dtype):
        raise TypeError(f"{who} got {name} of {x.dtype}; it takes {jnp.dtype(dtype).name}. Cast it first.")


def check_group(who: str, group: int | None, k: int) -> int:
    """The length of a group, `k` for None.

    Raises: ValueError unless it is a multiple of 32 that divides k."""
    if group is None:
        return k
    if group < 32 or group % 32 or k % group:
        legal = [g for g in (32, 64, 128, 256) if k % g == 0]
        fail(who, f"got group={group} for K={k}", f"A group is a multiple of 32 that divides K (here {legal}), or None")
    return group
