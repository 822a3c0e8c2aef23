"""Grids of optimizer states that the catalogue of element formats does not have.

Signed first moments use `formats.DYNAMIC_TREE8` and `DYNAMIC_TREE4`, which the catalogue has.
"""

import numpy as np

from lowbit_jax.formats.base import Codebook, IntFormat


def unsigned_dynamic_tree_values(bits: int) -> tuple[float, ...]:
    """The dynamic-tree data type without a sign, on [0, 1], ascending: the sign's bit refines the fraction.

    The decade `10**(i - last)` holds `2**(i + 1)` midpoints of equal parts of [0.1, 1], i = 0..last = bits - 2; zero
    and one are added.
    Source: Dettmers et al. 2022, arXiv:2110.02861, section 2.1, as `create_dynamic_map(signed=False)` of bitsandbytes
    and torchao have it."""
    last = bits - 2
    values = [0.0, 1.0]
    for i in range(bits - 1):
        edges = np.linspace(0.1, 1.0, 2 ** (i + 1) + 1)
        values += (10.0 ** (i - last) * (edges[:-1] + edges[1:]) / 2).tolist()
    return tuple(sorted(values))


UNSIGNED_DYNAMIC_TREE8 = Codebook(
    name="unsigned_dynamic_tree8",
    values=unsigned_dynamic_tree_values(8),
    source="Dettmers et al. 2022, 8-bit optimizers, arXiv:2110.02861",
)
LINEAR4_WITHOUT_ZERO = IntFormat(
    name="linear4_without_zero",
    low=1,
    high=16,
    source="Li et al. 2023, 4-bit optimizer states, arXiv:2309.01507, section 4.1: 1/16 ... 16/16 of the scale",
)
