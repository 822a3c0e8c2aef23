"""One mesh for every kind of parallelism: `data` and `fsdp` cut the batch, `fsdp` and `tensor` cut the weights.

`jax.make_mesh` makes axes of explicit type, under which a plain row-parallel product raises; the rules here leave the
cuts of everything between inputs and outputs to XLA, so the axes are of type Auto.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "tensor")


def make_mesh(
    sizes: str | Mapping[str, int] | None = None, *, devices: Sequence[Any] | None = None, **more: int
) -> Mesh:
    """A mesh with the axes data, fsdp and tensor, 1 long unless given, then any others: `make_mesh(data=2, tensor=4)`.

    `sizes` says the same as text, "data=2,fsdp=-1", or as a mapping; one axis may be -1, all devices that are left.
    The first devices are taken where there are more than the mesh needs; several processes need all of them.
    Raises: ValueError for sizes that are not positive, text that cannot be read, and more devices than are present."""
    given = dict(parse_mesh(sizes) if isinstance(sizes, str) else sizes or {})
    if twice := sorted(set(given) & set(more)):
        raise ValueError(f"make_mesh got the axes {twice} twice. Give each once.")
    axes = dict.fromkeys(AXES, 1) | given | more
    found = list(jax.devices() if devices is None else devices)
    axes = _filled(axes, len(found))
    needed = math.prod(axes.values())
    product = " x ".join(f"{name}={size}" for name, size in axes.items() if size > 1) or "1"
    if needed > len(found):
        raise ValueError(
            f"make_mesh: {product} is {needed} devices, and {len(found)} are present"
            f" ({found[0].platform if found else 'none'}). Lower an axis; to try it on a CPU, start Python with"
            f" XLA_FLAGS=--xla_force_host_platform_device_count={needed}."
        )
    if jax.process_count() > 1 and devices is None and needed < len(found):
        raise ValueError(
            f"make_mesh: {product} is {needed} devices, and the {jax.process_count()} processes have {len(found)}. Each"
            f" process must take part: raise an axis so that the product is {len(found)} (one may be -1)."
        )
    if devices is None and needed == len(found):
        return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    grid = np.asarray(found[:needed]).reshape(tuple(axes.values()))
    return Mesh(grid, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def parse_mesh(text: str) -> dict[str, int]:
    """{"data": 2, "fsdp": 4} from "data=2,fsdp=4". Raises: ValueError for anything else."""
    axes: dict[str, int] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, _, size = (p.strip() for p in part.partition("="))
        if not name.isidentifier() or not size.removeprefix("-").isdigit() or name in axes:
            raise ValueError(f"The mesh {text!r}: {part!r} is not axis=size, each axis once, as in data=2,fsdp=4.")
        axes[name] = int(size)
    for name in axes:
        if name not in AXES and (near := difflib.get_close_matches(name, AXES, n=1, cutoff=0.6)):
            raise ValueError(f"The mesh {text!r} has no axis {name!r} to give a meaning to. Did you mean {near[0]!r}?")
    return axes


def _filled(axes: dict[str, int], devices: int) -> dict[str, int]:
    """The sizes with -1 replaced by what is left of the devices."""
    for name, size in axes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size == 0 or size < -1:
            raise ValueError(f"make_mesh: the axis {name!r} has size {size!r}. Give 1 or more, or -1 for the rest.")
    open_axes = [name for name, size in axes.items() if size == -1]
    if not open_axes:
        return axes
    fixed = math.prod(size for size in axes.values() if size > 0)
    if len(open_axes) > 1 or devices % fixed:
        raise ValueError(
            f"make_mesh: {open_axes} cannot take what is left of {devices} devices after {fixed}. Only one axis may be"
            " -1, and the others must divide the devices."
        )
    return axes | {open_axes[0]: devices // fixed}
