"""Into how many programs a product of few rows is cut: it is bound by reading the weights, and by how many warps do it.

By the times of an H100 (`benchmarks.gpu`): 14336 x 4096 at one row in 224 programs of 64 output channels, and 4- and
8-bit weights with 16-bit activations, which take more instructions a byte, in four times as many.
"""

from pallas_kernels import tuning

_SHARED_MEMORY = 96 * 1024  # bytes that a program may use on every GPU since Ampere, nearly; an H100 has 227 KiB
_STAGES = 3
_PARTS = (1, 2, 4, 8)
_TURNS = 4  # of a program's loop at least, so that loads and arithmetic overlap


def split(programs: int, steps: int, waves: int) -> int:
    """Parts of the contraction of `steps` turns: the fewest with which `programs` become about `waves` times as many as
    the GPU has multiprocessors."""
    fitting = [s for s in _PARTS if steps % s == 0 and (s == 1 or steps // s >= _TURNS)]
    return next((s for s in fitting if s * programs >= waves * tuning.PROGRAMS // 2), fitting[-1])


def stages(tile_bytes: int, most: int = _STAGES) -> int:
    """Pipeline stages, as far as shared memory goes: all but the first are `tile_bytes` on their way."""
    return min(most, 1 + _SHARED_MEMORY // tile_bytes)
