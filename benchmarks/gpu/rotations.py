"""The fused quantizations by their best tiles, as a fraction of the bandwidth that a copy has."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from benchmarks.gpu.course import Course
from benchmarks.gpu.operands import bytes_of
from benchmarks.gpu.speed import COMPILING, NO_SPILLS, Roof, on_device, one_by_one, seconds, store
from pallas_kernels import both_ways, hadamard_backward, hadamard_quantize, planes
from pallas_kernels.launch import Tile

ARRAYS = 16  # in one program: several times the cache, and more work than a call costs the host
_tiles = lambda *each: tuple(Tile(rows=r, columns=c, warps=w, stages=s, split=k) for r, c, w, s, k in each)
# Rows, columns, warps, stages and split: of quantizations, of the way back, of cotangents; None is the default.
FORTH = (
    None,
    *_tiles((64, 128, 4, 2, 4), (64, 128, 4, 2, 8), (64, 128, 4, 3, 8), (64, 128, 8, 2, 8), (128, 128, 8, 2, 4)),
)
BACKWARD = None, *_tiles((64, 16, 4, 1, 1), (64, 16, 8, 1, 1), (64, 128, 4, 2, 2), (64, 128, 4, 2, 4),
                         (64, 128, 4, 2, 8), (64, 128, 4, 3, 4), (128, 128, 8, 2, 4))  # fmt: skip
BOTH_WAYS = _tiles((64, 64, 4, 1, 1), (64, 64, 8, 1, 1), (64, 128, 4, 1, 1), (128, 64, 8, 1, 1), (128, 128, 8, 1, 1))
DIFFER = 1e-3  # share of elements: a sum in another order moves a code that lies at a tie
TOKENS = 16384  # of the training step
QUANTIZE = (  # bits, M, K, dtype, packed
    (4, 8192, 4096, "bfloat16", True), (8, 8192, 4096, "bfloat16", False), (1, 8192, 4096, "bfloat16", True),
    (4, TOKENS, 2048, "bfloat16", True), (4, TOKENS, 5632, "bfloat16", True), (8, TOKENS, 2048, "bfloat16", False),
    (8, TOKENS, 5632, "bfloat16", False), (4, 11264, 2048, "float32", True), (4, 6144, 2048, "float32", True),
    (4, 2048, 2048, "float32", True), (4, 2048, 5632, "float32", True), (8, 11264, 2048, "float32", False),
    (8, 6144, 2048, "float32", False), (8, 2048, 2048, "float32", False), (8, 2048, 5632, "float32", False),
)  # fmt: skip
BACK = (  # M, K, axis and dtype of the result
    (TOKENS, 2048, 1, "bfloat16"), (TOKENS, 5632, 1, "bfloat16"),
    (11264, 2048, 0, "float32"), (2048, 5632, 0, "float32"),
)  # fmt: skip
COTANGENTS = ((TOKENS, 2048), (TOKENS, 6144), (TOKENS, 11264))  # M, N


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """A fused quantization: its kernel, the key of its tile in the tuning table, the tiles that are tried, the default
    first, the arguments of each run. by_xla: the same by XLA, where the kernel is taken only if it is faster."""

    name: str
    key: str
    run: Callable[..., Any]
    tiles: tuple[Tile | None, ...]
    arguments: list[tuple]
    by_xla: Callable[..., Any] | None = None

    def compiled(self, tile: Tile | None) -> Callable:
        return _over(functools.partial(self.run, tile=tile)).lower(self.arguments).compile(compiler_options=NO_SPILLS)

    def xla(self) -> dict[str, Callable]:
        """XLA's program under its name, if there is one to compare with. It answers with everything: of what it makes
        by itself XLA computes what is asked for."""
        if (run := self.by_xla) is None:
            return {}
        return {"xla": functools.partial(jax.jit(lambda arguments: [run(*a) for a in arguments]), self.arguments)}


def _over(run: Callable) -> Callable:
    """`arguments of every run -> (the first result, a number of every array of each)`."""
    return jax.jit(functools.partial(one_by_one, run))


def cases() -> Iterator[Case]:
    """Activations and weights (float32) of an 800M model, and activations of the products of `benchmarks.gpu.speed`."""
    normal = lambda shape, dtype: [jax.random.normal(jax.random.key(i), shape, dtype) for i in range(ARRAYS)]
    for bits, m, k, dtype, packed in QUANTIZE:
        options = dict(bits=bits, alpha=0.4, trust=2.0 ** (bits - 1), packed=packed)
        yield Case(
            f"hadamard_quantize{bits} {m}x{k} {dtype}{' packed' if packed else ''}",
            hadamard_quantize.tuning_key(m, k, 1, jnp.dtype(dtype), packed),
            functools.partial(hadamard_quantize.hadamard_quantize, **options),
            FORTH,
            [(x,) for x in normal((m, k), dtype)],
        )
    for m, k, axis, dtype in BACK:
        mask = jax.random.randint(jax.random.key(9), (-(-k // 256), m, planes.COLUMNS), -128, 128, jnp.int8)
        yield Case(
            f"hadamard_backward {m}x{k} axis{axis}",
            hadamard_backward.tuning_key(m, k, axis, jnp.dtype(dtype)),
            functools.partial(hadamard_backward.hadamard_backward, axis=axis, out_dtype=jnp.dtype(dtype)),
            BACKWARD,
            [(g, mask) for g in normal((m, k), "bfloat16")],
        )
    for m, n in COTANGENTS:
        weights = jnp.linspace(0.5, 1.5, n, dtype=jnp.float32), jnp.linspace(0.5, 1.5, m, dtype=jnp.float32)
        yield Case(
            f"quantize_both_ways {m}x{n}",
            both_ways.tuning_key(m, n, jnp.bfloat16),
            both_ways.quantize_both_ways,
            BOTH_WAYS,
            [(g, *weights) for g in normal((m, n), "bfloat16")],
            functools.partial(both_ways.quantize_both_ways, impl="xla"),
        )


def measure(roof: Roof, course: Course) -> Iterator[dict]:
    """One row a case that the course wants: microseconds by the best tile, which goes into the user's tuning table, and
    by the default. A tile whose results are not the default's is not timed, and the row names it."""
    every = [case for case in cases() if course.wants(case.name)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [[(tile, pool.submit(case.compiled, tile)) for tile in case.tiles] for case in every]
        built = []
        for case, each in zip(every, jobs, strict=True):
            course.now(f"compiling {case.name}", COMPILING)
            built.append({str(tile): (tile, job.result()) for tile, job in each if job.exception() is None})
    copied, copy = jnp.ones((ARRAYS, 8192, 4096), jnp.bfloat16), jax.jit(lambda a: a + 1)
    for case, each in zip(every, built, strict=True):
        if not course.wants(case.name):
            continue
        course.now(case.name)
        if not each:
            store(case.key, None)
            print(f"{case.name}: no tile compiles without spills", flush=True)
            continue
        programs = {name: functools.partial(program, case.arguments) for name, (_, program) in each.items()}
        expected = (case.xla().get("xla") or next(iter(programs.values())))()[0]
        apart = {name: difference(run()[0], expected) for name, run in programs.items()}
        wrong = [name for name, share in apart.items() if not share <= DIFFER]
        if not (programs := {name: run for name, run in programs.items() if name not in wrong}):
            store(case.key, None)  # of an earlier run
            yield {"kernel": case.name, "wrong_tiles": [f"{name}: {apart[name]:.2g}" for name in wrong]}
            continue
        times = seconds(programs | case.xla() | {"copy": lambda: copy(copied)}, course.rounds)
        took = {name: float(np.median(t)) / ARRAYS for name, t in times.items()}
        best = min(programs, key=took.__getitem__)
        tile, device, default = each[best][0], on_device(programs[best], ARRAYS), took.get(str(case.tiles[0]))
        if tile is not None:
            store(case.key, tile if took[best] < took.get("xla", np.inf) else None)
        moved = bytes_of(case.arguments[0]) + bytes_of(jax.eval_shape(case.run, *case.arguments[0]))
        copied_a_second = 2 * copied.nbytes / ARRAYS / took["copy"]
        row = {
            "kernel": case.name, "wrong_tiles": [f"{name}: {apart[name]:.2g}" for name in wrong],
            "us": 1e6 * took[best], "default_us": default and 1e6 * default,
            "xla_us": 1e6 * took["xla"] if "xla" in took else None,
            "bytes_a_second": moved / took[best], "of_copy_bandwidth": moved / took[best] / copied_a_second,
            "device_us": device and 1e6 * device,
            "device_of_copy_bandwidth": device and moved / device / roof.bandwidth,
            "tile": None if tile is None else dataclasses.asdict(tile),
            "tried_us": {name: 1e6 * took[name] for name in programs},
        }  # fmt: skip
        of = 100 * row["of_copy_bandwidth"]
        print(f"{case.name}: {1e6 * took[best]:.1f} us, {of:.0f}% of a copy; {tile or 'the default tile'}", flush=True)
        yield row


def difference(got: Any, expected: Any) -> float:
    """The largest share of elements of an array that differ by more than a rounding (of integers and words, at all).

    Sums are those of the codes beside them, or infinitely far: each moved code is in one of few sums."""
    if isinstance(got, hadamard_quantize.Quantized):
        if not bool(_sums_hold(got.codes, got.sums)):
            return np.inf
        got, expected = got._replace(sums=None), expected._replace(sums=None)
    shares = [0.0]
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(a.dtype, jnp.integer):
            apart = a != b
        else:
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
            apart = ~(jnp.abs(a - b) <= 2.0**-7 * jnp.abs(b).max())
        shares.append(float(apart.mean()))
    return max(shares)


@jax.jit
def _sums_hold(codes: Array, sums: Array) -> Array:
    return (codes.sum(1, dtype=jnp.int32) == sums).all()
