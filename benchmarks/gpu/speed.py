"""Times of kernels over bfloat16 `jnp.dot` in one process, over several weights in turn so that none stays in cache."""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.operands import Product
from pallas_kernels import planes, tuning
from pallas_kernels.hadamard_quantize import hadamard_quantize
from pallas_kernels.launch import Tile

L2 = 64 << 20  # bytes that the weights of one timing exceed several times


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Roof:
    """What the chip can do: bytes a second from memory, operations a second of its tensor cores."""

    bandwidth: float = 4.3e12
    bfloat16: float = 790e12
    int8: float = 1580e12

    def seconds(self, p: Product) -> float:
        """The least time of the product: its bytes or its operations, whichever takes longer."""
        width = 2 if p.kernel == "matmul_a16" else 1
        size = p.n * p.k * p.bits / 8 + p.m * p.k * width + p.m * p.n * 2
        return max(size / self.bandwidth, 2 * p.m * p.n * p.k / (self.bfloat16 if width == 2 else self.int8))


def seconds(programs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Name -> seconds a call in each round; programs take turns in a random order."""
    for run in programs.values():
        jax.block_until_ready(run())
    found: dict[str, list[float]] = {name: [] for name in programs}
    names, random = list(programs), np.random.default_rng(0)
    for _ in range(rounds):
        random.shuffle(names)
        for name in names:
            start = time.perf_counter()
            jax.block_until_ready([programs[name]() for _ in range(5)][-1])
            found[name].append((time.perf_counter() - start) / 5)
    return found


def over_weights(run: Callable) -> Callable:
    """`(x, weights) -> results`: one program that runs the product with each weight in turn."""
    return jax.jit(lambda x, weights: [run(x, w) for w in weights])


def tiles(p: Product) -> list[Tile]:
    """Candidates for a shape, the default first."""
    if p.kernel == "matmul_a16":
        from pallas_kernels.matmul_a16 import _steps, default_tile

        first = default_tile(p.m, p.n, p.k, p.bits, p.group or p.k)
        steps = _steps(p.k, p.bits, p.group or p.k)
    else:
        from pallas_kernels.matmul_a8 import _steps, default_tile

        first, steps = default_tile(p.m, p.n, p.k, p.bits), _steps(p.k, p.bits)
    rows = {first.rows} if p.m <= 64 else {64, 128}
    columns = [c for c in ((32, 64, 128) if p.m <= 64 else (64, 128, 256)) if planes.padded_n(p.n) % c == 0]
    splits = [s for s in (1, 2, 4, 8) if steps % s == 0 and steps // s >= 2] if p.m <= 64 else [1]
    warps = (2, 4) if p.m <= 64 else (4, 8)
    grid = itertools.product(rows, columns, warps, (2, 3, 4), splits)
    found = [Tile(rows=r, columns=c, warps=w, stages=s, split=k) for r, c, w, s, k in grid]
    near = sorted(found, key=lambda t: abs(np.log2(t.columns / first.columns)) + abs(np.log2(t.split / first.split)))
    return list(dict.fromkeys([first, *near]))[:10]


def tune(p: Product, rounds: int = 3, workers: int = 12) -> tuple[Tile, dict[str, float]]:
    """The fastest candidate that compiles, and the milliseconds of each."""
    x, weights = p.activation(0), [p.weight(i) for i in range(_count(p))]

    def build(tile: Tile):
        try:
            return tile, over_weights(p.run("triton", tile)).lower(x, weights).compile()
        except Exception:  # this tile does not fit the chip: not a candidate
            return tile, None

    with ThreadPoolExecutor(workers) as pool:
        built = [(t, c) for t, c in pool.map(build, tiles(p)) if c is not None]
    programs = {str(i): (lambda c=c: c(x, weights)) for i, (_, c) in enumerate(built)}
    times = seconds(programs, rounds)
    each = {i: float(np.median(t)) / len(weights) for i, t in times.items()}
    best = min(each, key=each.__getitem__)
    return built[int(best)][0], {str(built[int(i)][0]): 1e3 * t for i, t in each.items()}


def _count(p: Product) -> int:
    return max(8, min(32, -(-4 * L2 // (p.n * p.k * p.bits // 8))))


def compare(shapes: Sequence[tuple[int, int, int]], products: Sequence[tuple[str, int, int | None]], rounds: int,
            roof: Roof, tuned: bool = True) -> list[dict]:  # fmt: skip
    """One row a product and shape: milliseconds, ratio over bfloat16, fraction of the roof."""
    rows = []
    for m, n, k in shapes:
        x16 = jnp.asarray(np.random.default_rng(0).standard_normal((m, k), np.float32), jnp.bfloat16)
        w16 = [
            jax.random.normal(jax.random.key(i), (k, n), jnp.bfloat16) for i in range(max(8, -(-4 * L2 // (2 * n * k))))
        ]
        dot = over_weights(jnp.dot)
        for kernel, bits, group in products:
            p = Product(kernel=kernel, bits=bits, m=m, n=n, k=k, group=group)
            tile, tried = tune(p) if tuned else (None, {})
            x, weights = p.activation(0), [p.weight(i) for i in range(_count(p))]
            run, xla = over_weights(p.run("triton", tile)), over_weights(p.run("xla"))
            programs = {
                "bfloat16": functools.partial(dot, x16, w16),
                "kernel": functools.partial(run, x, weights),
                "xla": functools.partial(xla, x, weights),
            }
            times = seconds(programs, rounds)
            base = np.asarray(times["bfloat16"]) / len(w16)
            each = {name: np.asarray(times[name]) / len(weights) for name in ("kernel", "xla")}
            rows.append({
                "product": p.name, "group": group, "m": m, "n": n, "k": k,
                "tile": None if tile is None else dataclasses.asdict(tile), "tried_ms": tried,
                "bfloat16_us": 1e6 * float(np.median(base)), "kernel_us": 1e6 * float(np.median(each["kernel"])),
                "xla_us": 1e6 * float(np.median(each["xla"])),
                "ratio": float(np.median(base / each["kernel"])), "xla_ratio": float(np.median(base / each["xla"])),
                "of_roof": roof.seconds(p) / float(np.median(each["kernel"])),
            })  # fmt: skip
            if tile is not None:
                tuning.store(
                    {tuning.key(kernel, bits, m, n, k): dataclasses.asdict(tile)}, jax.devices()[0].device_kind
                )
            print(line(rows[-1]), flush=True)
    return rows


def fused(m: int, k: int, rounds: int, roof: Roof) -> list[dict]:
    """The fused quantization as a fraction of the time that copying its input and outputs would take."""
    rows = []
    arrays = [jax.random.normal(jax.random.key(i), (m, k), jnp.bfloat16) for i in range(6)]
    copy = jax.jit(lambda a: [x + jnp.bfloat16(1) for x in a])
    for bits in (1, 4, 8):
        quantize = jax.jit(
            lambda a, bits=bits: [hadamard_quantize(x, bits=bits, alpha=0.4, trust=2.0 ** (bits - 1)) for x in a]
        )
        times = seconds({"copy": lambda: copy(arrays), "quantize": lambda q=quantize: q(arrays)}, rounds)
        moved = m * k * (2 + 1 + 1 / 8)
        each = {name: float(np.median(t)) / len(arrays) for name, t in times.items()}
        rows.append({"kernel": f"hadamard_quantize{bits}", "m": m, "k": k, "us": 1e6 * each["quantize"],
                     "copy_bytes_a_second": m * k * 4 / each["copy"], "bytes_a_second": moved / each["quantize"],
                     "of_copy_bandwidth": moved / each["quantize"] / (m * k * 4 / each["copy"]),
                     "of_roof": moved / roof.bandwidth / each["quantize"]})  # fmt: skip
    return rows


def line(row: Mapping) -> str:
    return (
        f"{row['product']:8s} {row['m']:6d} {row['n']}x{row['k']} {row['kernel_us']:8.1f} us {row['ratio']:5.2f}x bf16"
        f" ({row['bfloat16_us']:.1f} us), {100 * row['of_roof']:.0f}% of the roof; XLA {row['xla_ratio']:.2f}x"
    )
