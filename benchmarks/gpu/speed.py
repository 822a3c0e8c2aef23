"""Times of kernels over bfloat16 `jnp.dot` in one process, over several weights in turn so that none stays in cache."""

import dataclasses
import functools
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from benchmarks.gpu import profile
from benchmarks.gpu.course import Course
from benchmarks.gpu.operands import Product
from pallas_kernels import (
    chips,
    launch,
    matmul_a8,
    matmul_a16,
    matmul_fp8,
    matmul_i8,
    matmul_i8_hopper,
    matmul_mx,
    tuning,
)
from pallas_kernels.launch import Tile

TOGETHER = 4  # products whose programs are compiled at once, on all cores, before the first of them is timed
BEST = 3  # tiles that are timed again beside bfloat16
ROUNDING = 2.0**-6  # by which results of two tiles may differ, of the largest
COMPILING = 200.0  # seconds that all programs of `TOGETHER` products, or of all rotations, may take
CACHES = 4  # times that the weights of a product fill the second-level cache, at least
PASSES = 8  # times that a program of few rows goes through its weights, each with other activations
MOST_SETS = 32
NO_SPILLS: Any = {"xla_gpu_fail_ptx_compilation_on_register_spilling": True}  # a candidate that spills does not compile


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Roof:
    """What this chip does: bytes a second of a copy, operations a second of its tensor cores.

    int8 is taken as twice bfloat16, as the chips since Ampere have it on paper."""

    bandwidth: float
    bfloat16: float

    @classmethod
    def measured(cls, rounds: int = 5) -> "Roof":
        """By a copy of 2 GiB and a product of 8192^3."""
        flat = jnp.ones((1 << 29,), jnp.float32)
        a = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
        copy, dot = jax.jit(lambda x: x + 1), jax.jit(jnp.dot)
        times = seconds({"copy": lambda: copy(flat), "dot": lambda: dot(a, a)}, rounds)
        least = {name: min(t) for name, t in times.items()}
        return cls(bandwidth=2 * flat.nbytes / least["copy"], bfloat16=2 * 8192**3 / least["dot"])

    def seconds(self, p: Product) -> float:
        """The least time of the product: its bytes or its operations, whichever takes longer."""
        size = p.n * p.k * p.bits / 8 + p.m * p.k * p.activation_bytes + p.m * p.n * 2
        rate = self.bfloat16 * (1 if p.activation_bytes == 2 else 2)
        return max(size / self.bandwidth, 2 * p.m * p.n * p.k / rate)


def seconds(programs: Mapping[str, Callable[[], object]], rounds: int, calls: int = 5) -> dict[str, list[float]]:
    """Name -> seconds a call in each round, of `calls` in a row; programs take turns in a random order."""
    for run in programs.values():
        jax.block_until_ready(run())
    found: dict[str, list[float]] = {name: [] for name in programs}
    names, random = list(programs), np.random.default_rng(0)
    for _ in range(rounds):
        random.shuffle(names)
        for name in names:
            start = time.perf_counter()
            jax.block_until_ready([programs[name]() for _ in range(calls)][-1])
            found[name].append((time.perf_counter() - start) / calls)
    return found


def one_by_one(run: Callable, arguments: Iterable[tuple]) -> tuple[Any, Array]:
    """Inside a program, `run` of each of the arguments in turn: the first result, and a number of every array of each.

    Barriers put one behind the other, or XLA would make one product of several with one weight, and leave out what no
    one asks for. The answer is small because every array that a program takes or gives costs the host about five
    microseconds, which a kernel of few rows is done in."""
    one = jax.jit(run)  # traced once
    first, last, found = None, None, []
    numbers = lambda result: [leaf[(0,) * leaf.ndim].astype(jnp.float32) for leaf in jax.tree.leaves(result)]
    for each in arguments:
        if last is not None:
            last, each = lax.optimization_barrier((last, each))
            found += numbers(last)
        last = one(*each)
        first = last if first is None else first
    return first, jnp.stack([*found, *numbers(lax.optimization_barrier(last))])


def over_weights(run: Callable, name: str) -> Callable:
    """`(activations, weights) -> (the first result, a number of each)`: one program, called `name`, that runs the
    products of each activation with each weight in turn."""

    def each(xs, weights):
        return one_by_one(run, itertools.product(xs, weights))

    each.__name__ = name
    return jax.jit(each)


def default(p: Product) -> Tile:
    """The tile that the kernel takes without a tuned one."""
    match p.kernel:
        case "matmul_a16":
            return matmul_a16.default_tile(p.m, p.n, p.k, p.bits, p.group or p.k)
        case "matmul_a8":
            return matmul_a8.default_tile(p.m, p.n, p.k, p.bits)
        case "matmul_i8":
            return matmul_i8.default_tile(p.m, p.n, p.k)
        case "matmul_i8_hopper":
            return matmul_i8_hopper.default_tile(p.m, p.n, p.k)
        case "matmul_mx":
            return matmul_mx.default_tile(p.m, p.n, p.k, f"mxfp{p.bits}")
        case _:
            return matmul_fp8.default_tile(p.m, p.n, p.k)


# (columns, warps, stages, split) of products with few rows, by kernel.
FEW_ROWS: Mapping[str, tuple] = {
    "matmul_a16": ((64, 2, 3, 4), (64, 4, 2, 4), (64, 4, 3, 1), (64, 2, 3, 2), (128, 4, 2, 8)),
    "matmul_a8": ((64, 2, 4, 1), (64, 2, 3, 2), (32, 1, 4, 1), (32, 1, 5, 1), (32, 2, 5, 1)),
    "matmul_mx": ((64, 2, 3, 1), (64, 2, 3, 2), (64, 2, 3, 4)),
}
EIGHT_ROWS: Mapping[str, tuple] = {
    "matmul_a16": ((128, 4, 2, 8), (64, 2, 3, 4), (64, 4, 2, 4), (64, 4, 3, 4), (32, 2, 3, 1), (32, 2, 3, 4)),
    "matmul_a8": ((32, 1, 4, 1), (32, 1, 5, 1), (32, 1, 6, 1), (16, 1, 4, 1), (64, 2, 4, 1)),
}


def candidates(p: Product) -> list[Tile | None]:
    """The default first, then tiles that were among the best of a wide search for such a product: on an H100, or for up
    to 8 rows, of tiles of 8, on an H200; what a kernel refuses or a chip cannot hold falls out when compiled."""
    if p.kernel == "matmul_fp8":
        return [None]
    if p.m > 64:
        wide = [(r, c, 8, s) for r, c in matmul_i8_hopper.TILES for s in ((4, 6) if r == c else (3, 4))]
        plain = [(128, 128, 8, 3), (128, 128, 8, 4), (128, 256, 8, 4), (64, 256, 8, 3)]
        sizes = [(*t, 1) for t in (wide if p.kernel == "matmul_i8_hopper" else plain)]
    else:
        rows = launch.power_of_two(p.m, 16, 64)
        sizes = [(rows, *each) for each in FEW_ROWS.get(p.kernel, ())]
        if p.m <= launch.LEAST_ROWS and p.kernel in EIGHT_ROWS:
            sizes = [(launch.LEAST_ROWS, *each) for each in EIGHT_ROWS[p.kernel]]
    tiles = [Tile(rows=r, columns=c, warps=w, stages=s, split=k) for r, c, w, s, k in sizes]
    none = [None] if p.kernel == "matmul_a8" and p.m > 64 else []  # what it does without a tile: unpacks first
    return list(dict.fromkeys([*none, default(p), *tiles]))


def weights_of(p: Product) -> list[list[tuple]]:
    """The weights of one program, `copies` of them, and others for the next calls, together several times the cache."""
    return [[p.weight(first + i) for i in range(copies(p.m))] for first in range(0, sets(p) * copies(p.m), copies(p.m))]


def copies(m: int) -> int:
    """How many weights in a program."""
    return 16 if m <= 64 else 8


def activations(p: Product) -> list[tuple]:
    """Those of one program: with few rows so many that what it costs beside its kernels is little for each."""
    return [p.activation(i) for i in range(passes(p.m))]


def passes(m: int) -> int:
    return PASSES if m <= 64 else 1


def runs(m: int) -> int:
    """Products of one call of a program."""
    return copies(m) * passes(m)


def sets(p: Product) -> int:
    """How many times `copies` weights fill the chip's second-level cache `CACHES` times, up to `MOST_SETS`."""
    here = [chip.l2 for chip in chips.CHIPS.values() if chip.capability == chips.traced_capability()]
    cache = max(here or [chip.l2 for chip in chips.CHIPS.values()])
    return min(MOST_SETS, -(-CACHES * cache // (copies(p.m) * p.n * p.k * p.bits // 8)))


def in_turn(run: Callable, xs: list[tuple], weights: Sequence[list[tuple]]) -> Callable[[], tuple]:
    """`run(xs, a set of weights)`, called with each set in turn."""
    left = itertools.cycle(weights)
    return lambda: run(xs, next(left))


@dataclasses.dataclass(frozen=True, slots=True)
class Built:
    """A product's programs over all its weights: one a tile that compiles without spills, and XLA's."""

    product: Product
    tiles: list[tuple[Tile | None, Callable]]
    xla: Callable


def build(products: Sequence[Product], pool: ThreadPoolExecutor, course: Course) -> list[Built]:
    """Compiles everything at once, on all cores."""

    def compiled(p: Product, impl: str, tile: Tile | None):
        x, w = jax.eval_shape(lambda: p.activation(0)), jax.eval_shape(lambda: p.weight(0))
        times = passes(p.m) if impl == "kernel" else 1  # which XLA takes long enough for
        lowered = over_weights(p.run(impl, tile), f"{p.name}_{impl}").lower([x] * times, [w] * copies(p.m))
        return lowered.compile(compiler_options=NO_SPILLS if impl == "kernel" else None)

    wanted: list[tuple[Product, list]] = []
    for p in products:
        jobs = [(tile, pool.submit(compiled, p, "kernel", tile)) for tile in candidates(p)]
        wanted.append((p, [*jobs, (None, pool.submit(compiled, p, "xla", None))]))
    built = []
    for p, (*jobs, (_, xla)) in wanted:
        course.now(f"compiling {label(p)}", COMPILING)
        # An error is a tile that does not fit the shape or the chip: not a candidate.
        tiles = [(tile, job.result()) for tile, job in jobs if job.exception() is None]
        if not tiles:
            print(
                f"{p.name} for {p.m} rows: no tile compiles without spills: {jobs[0][1].exception()}"[:600], flush=True
            )
        built.append(Built(p, tiles, xla.result()))
    return built


def compare(shapes: Sequence[tuple[int, int, int]], kernels: Sequence[tuple[str, int, int | None]], roof: Roof,
            course: Course) -> Iterator[dict]:  # fmt: skip
    """One row a product and shape as soon as it is there: the best tile, microseconds, ratio over bfloat16, fraction of
    the roof. Nothing is compiled or timed that the course does not want."""
    hopper = chips.traced_capability() == (9, 0)
    missing = {"matmul_mx": matmul_mx.why_not() is not None, "matmul_i8_hopper": not hopper}
    kernels = [each for each in kernels if not missing.get(each[0])]
    products = {(m, n, k): [Product(kernel=kernel, bits=bits, m=m, n=n, k=k, group=group)
                            for kernel, bits, group in kernels] for m, n, k in shapes}  # fmt: skip
    for (m, n, k), each in products.items():
        dot, dot_device = None, None
        for first in range(0, len(each), TOGETHER):
            some = [p for p in each[first : first + TOGETHER] if course.wants(label(p))]
            if not some:
                continue
            if dot is None:
                course.now(f"bfloat16 for {m} rows of {n}x{k}")
                x16 = [jax.random.normal(jax.random.key(i), (m, k), jnp.bfloat16) for i in range(passes(m))]
                w16 = [jax.random.normal(jax.random.key(i), (k, n), jnp.bfloat16) for i in range(copies(m))]
                dot = functools.partial(over_weights(jnp.dot, "bfloat16"), x16, w16)
                dot_device = on_device(dot, runs(m))
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                built = build(some, pool, course)
            for b in built:
                course.now(label(b.product))
                if not b.tiles:
                    store(tuning.key(b.product.kernel, b.product.bits, m, n, k), None)  # of an earlier run
                else:
                    row = measured(b, dot, dot_device, course.rounds, roof)
                    print(line(row), flush=True)
                    yield row


def label(p: Product) -> str:
    """Of a product among those of a part."""
    return f"{p.name} for {p.m} rows of {p.n}x{p.k}"


def store(entry: str, tile: Tile | None) -> None:
    """The tile goes into the user's tuning table (None: out of it), if that can be written: the row of the report
    matters more."""
    try:
        tuning.store({entry: tile and dataclasses.asdict(tile)}, jax.devices()[0].device_kind)
    except (OSError, ValueError) as error:
        print(f"the tile of {entry} is in the report alone: {error}", flush=True)


@jax.jit
def _apart(y: Array, expected: Array) -> Array:
    """Largest difference over largest value, on the device; infinite where `y` is not finite, as a maximum may drop
    NaN (`lowbit_jax.scaling.fit.largest_magnitude`)."""
    y, expected = y.astype(jnp.float32), expected.astype(jnp.float32)
    return jnp.where(jnp.isfinite(y).all(), jnp.abs(y - expected).max() / jnp.abs(expected).max(), jnp.inf)


def measured(b: Built, dot: Callable, dot_device: float | None, rounds: int, roof: Roof) -> dict:
    """The row of one product; its best tile goes into the user's tuning table. A tile whose result is not XLA's is not
    timed, and the row names it."""
    p, xs, weights = b.product, activations(b.product), weights_of(b.product)
    count = runs(p.m)
    by_xla = in_turn(b.xla, xs[:1], weights)
    programs = {str(i): in_turn(run, xs, weights) for i, (_, run) in enumerate(b.tiles)}
    expected = by_xla()[0]
    apart = {str(i): float(_apart(run(xs, weights[0])[0], expected)) for i, (_, run) in enumerate(b.tiles)}
    right = [name for name, error in apart.items() if error <= ROUNDING]  # not where it is not a number
    tiles = {name: b.tiles[int(name)][0] for name in programs}
    row = {"product": p.name, "group": p.group, "m": p.m, "n": p.n, "k": p.k,
           "wrong_tiles": [f"{tiles[name]}: {apart[name]:.2g}" for name in programs if name not in right]}  # fmt: skip
    entry = tuning.key(p.kernel, p.bits, p.m, p.n, p.k)
    if not right:
        store(entry, None)  # of an earlier run
        return row
    tried = {name: float(np.median(t)) / count for name, t in
             seconds({name: programs[name] for name in right}, 3).items()}  # fmt: skip
    best = sorted(right, key=tried.__getitem__)[:BEST]  # too near each other for three rounds
    times = seconds({"bfloat16": dot, "xla": by_xla} | {name: programs[name] for name in best}, rounds)
    best = min(best, key=lambda name: float(np.median(times[name])))
    tile = tiles[best]
    base, kernel, xla = (np.asarray(times[name]) / each for name, each in
                         (("bfloat16", count), (best, count), ("xla", copies(p.m))))  # fmt: skip
    device = on_device(programs[best], count)
    if tile is not None:
        store(entry, tile)
    return row | {
        "bfloat16_us": 1e6 * float(np.median(base)), "kernel_us": 1e6 * float(np.median(kernel)),
        "xla_us": 1e6 * float(np.median(xla)), "ratio": float(np.median(base / kernel)),
        "xla_ratio": float(np.median(base / xla)), "of_roof": roof.seconds(p) / float(np.median(kernel)),
        "bfloat16_device_us": None if dot_device is None else 1e6 * dot_device,
        "kernel_device_us": None if device is None else 1e6 * device,
        "device_ratio": None if device is None or dot_device is None else dot_device / device,
        "tile": None if tile is None else dataclasses.asdict(tile),
        "tried_us": {json.dumps(tile and dataclasses.asdict(tile)): 1e6 * tried[name]
                     for name, tile in tiles.items() if name in tried},
    }  # fmt: skip


def on_device(run: Callable, count: int) -> float | None:
    """Seconds of one of `count` products without launch gaps; None where the profiler does not work."""
    try:
        return sum(profile.kernel_seconds(run, 1).values()) / count
    except Exception as error:  # CUPTI may be absent or locked; the times by the clock are there
        print(f"no device time: {type(error).__name__}: {error}"[:300], flush=True)
        return None


def line(row: Mapping) -> str:
    if "ratio" not in row:
        return f"{row['product']:8s} {row['m']:6d} {row['n']}x{row['k']} no tile is right: {row['wrong_tiles']}"
    return (
        f"{row['product']:8s} {row['m']:6d} {row['n']}x{row['k']} {row['kernel_us']:8.1f} us {row['ratio']:5.2f}x bf16"
        f" ({row['bfloat16_us']:.1f} us), {100 * row['of_roof']:.0f}% of the roof; XLA {row['xla_ratio']:.2f}x"
    )
