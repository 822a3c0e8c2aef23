"""How a product of few rows is cut into programs, and how deep its pipeline is: it is bound by reading the weights.

Nothing here was timed. A multiprocessor reads at full rate while enough bytes are on their way to it (rate times
latency), and all read for equally long only if each has equally many programs; `benchmarks.gpu` finds what is faster.
"""

from pallas_kernels import launch, planes, tuning

_MULTIPROCESSORS = 132  # an H200
_IN_FLIGHT = 40 << 10  # bytes: 4.8 TB/s over 132 multiprocessors, a microsecond long
_SECOND_KERNEL = 4 << 20  # bytes that could be read while the parts' sums are added: about a microsecond
_STAGES = 6
_SLICES = 64  # of x that are on their way: each is a load of its own, and many of them take long to compile


def balance(programs: int) -> float:
    """The part of the multiprocessors' time that is used, with two programs each at least and whole waves of them."""
    return programs / max(tuning.PROGRAMS, -(-programs // _MULTIPROCESSORS) * _MULTIPROCESSORS)


def split(programs: int, steps: int, weight_bytes: int, results: int) -> int:
    """Parts of the contraction for `programs` tiles: more fill the GPU better, and are added by a second kernel."""
    fitting = [s for s in (1, 2, 4, 8) if steps % s == 0 and (s == 1 or steps // s >= 4)]  # turns to overlap
    adding = lambda s: 0 if s == 1 else _SECOND_KERNEL + 4 * s * results
    return min(fitting, key=lambda s: weight_bytes / balance(s * programs) + adding(s))


def stages(programs: int, word_bytes: int, tile_bytes: int, step: int) -> int:
    """Pipeline stages that keep `_IN_FLIGHT` bytes of words on their way, as far as shared memory goes, and three at
    least, if there is room for them.

    word_bytes: of the words of a stage; tile_bytes: of all that a stage holds; step: its contraction indices."""
    resident = max(1, min(4, programs // _MULTIPROCESSORS))
    wanted = min(1 + -(-_IN_FLIGHT // (resident * word_bytes)), _STAGES, _SLICES // (step // planes.COLUMNS))
    fitting = launch.SHARED_MEMORY // min(4, -(-programs // _MULTIPROCESSORS)) // tile_bytes
    return max(min(wanted, fitting), min(3, launch.SHARED_MEMORY // tile_bytes), 1)
