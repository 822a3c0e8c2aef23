"""Times of kernels over bfloat16 `jnp.dot` in one process, over several weights in turn so that none stays in cache."""

import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.operands import Product, bytes_of
from pallas_kernels import matmul_a8, matmul_a16, matmul_fp8, matmul_i8, matmul_mx, planes, tuning
from pallas_kernels.hadamard_quantize import hadamard_quantize
from pallas_kernels.launch import Tile

L2 = 64 << 20  # bytes that the weights of one timing exceed several times
NO_SPILLS = {"xla_gpu_fail_ptx_compilation_on_register_spilling": True}  # a candidate that spills does not compile


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


def default(p: Product) -> Tile:
    """The tile that the kernel takes without a tuned one."""
    match p.kernel:
        case "matmul_a16":
            return matmul_a16.default_tile(p.m, p.n, p.k, p.bits, p.group or p.k)
        case "matmul_a8":
            return matmul_a8.default_tile(p.m, p.n, p.k, p.bits)
        case "matmul_i8":
            return matmul_i8.default_tile(p.m, p.n, p.k)
        case "matmul_mx":
            return matmul_mx.default_tile(p.m, p.n, p.k, f"mxfp{p.bits}")
        case _:
            return matmul_fp8.default_tile(p.m, p.n, p.k)


def candidates(p: Product, count: int = 10) -> list[Tile]:
    """The default first, then tiles like it; what a kernel refuses or a chip cannot hold falls out when compiled."""
    first, small = default(p), p.m <= 64
    rows = {first.rows} if small else {64, 128}
    columns = [c for c in ((32, 64, 128) if small else (64, 128, 256)) if planes.padded_n(p.n) % c == 0]
    splits = (1, 2, 4, 8) if small and p.kernel != "matmul_i8" else (1,)
    warps = (2, 4, 8) if small else (4, 8)
    grid = itertools.product(rows, columns, warps, (2, 3, 4), splits)
    found = [Tile(rows=r, columns=c, warps=w, stages=s, split=k) for r, c, w, s, k in grid]
    distance = lambda t: sum(
        abs(np.log2(getattr(t, f) / getattr(first, f))) for f in ("columns", "split", "warps", "stages")
    )
    return list(dict.fromkeys([first, *sorted(found, key=distance)]))[:count]


def tune(p: Product, rounds: int = 3, workers: int = 12) -> tuple[Tile, dict[str, float]]:
    """The fastest candidate that compiles without spills, and the milliseconds of each."""
    x, weights = p.activation(0), weights_of(p)

    def build(tile: Tile):
        try:
            lowered = over_weights(p.run("kernel", tile)).lower(x, weights)
            return tile, lowered.compile(compiler_options=NO_SPILLS)
        except Exception:  # this tile does not fit the shape or the chip: not a candidate
            return tile, None

    with ThreadPoolExecutor(workers) as pool:
        built = [(t, c) for t, c in pool.map(build, candidates(p)) if c is not None]
    if not built:
        raise RuntimeError(f"benchmarks.gpu: no tile of {p.name} for {p.m} rows compiles without spills.")
    programs = {str(i): (lambda c=c: c(x, weights)) for i, (_, c) in enumerate(built)}
    times = seconds(programs, rounds)
    each = {i: float(np.median(t)) / len(weights) for i, t in times.items()}
    best = min(each, key=each.__getitem__)
    return built[int(best)][0], {json.dumps(dataclasses.asdict(built[int(i)][0])): 1e3 * t for i, t in each.items()}


def weights_of(p: Product) -> list[tuple]:
    """As many weights as exceed the cache four times, at least 8."""
    first = p.weight(0)
    return [first, *(p.weight(i) for i in range(1, max(8, min(32, -(-4 * L2 // bytes_of(first))))))]


def compare(shapes: Sequence[tuple[int, int, int]], products: Sequence[tuple[str, int, int | None]], rounds: int,
            roof: Roof, until: float) -> list[dict]:  # fmt: skip
    """One row a product and shape: milliseconds, ratio over bfloat16, fraction of the roof. Nothing begins after the
    clock of `time.perf_counter` shows `until`."""
    rows = []
    for m, n, k in shapes:
        x16 = jax.random.normal(jax.random.key(1), (m, k), jnp.bfloat16)
        count = max(8, -(-4 * L2 // (2 * n * k)))
        w16 = [jax.random.normal(jax.random.key(i), (k, n), jnp.bfloat16) for i in range(count)]
        dot = over_weights(jnp.dot)
        for kernel, bits, group in products:
            if time.perf_counter() > until or (kernel == "matmul_mx" and matmul_mx.why_not()):
                continue
            p = Product(kernel=kernel, bits=bits, m=m, n=n, k=k, group=group)
            tile, tried = (None, {}) if kernel == "matmul_fp8" else tune(p)
            x, weights = p.activation(0), weights_of(p)
            run, xla = over_weights(p.run("kernel", tile)), over_weights(p.run("xla"))
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
    """The fused quantization as a fraction of the bandwidth of a copy; bytes are those of its argument and results."""
    found = []
    arrays = [jax.random.normal(jax.random.key(i), (m, k), jnp.bfloat16) for i in range(6)]
    copy = jax.jit(lambda a: [x + jnp.bfloat16(1) for x in a])
    for bits in (1, 4, 8):
        one = functools.partial(hadamard_quantize, bits=bits, alpha=0.4, trust=2.0 ** (bits - 1), packed=bits <= 4)
        quantize = jax.jit(lambda a, one=one: [one(x) for x in a])
        times = seconds({"copy": lambda: copy(arrays), "quantize": lambda q=quantize: q(arrays)}, rounds)
        moved = bytes_of(arrays[0]) + bytes_of(jax.eval_shape(one, arrays[0]))
        each = {name: float(np.median(t)) / len(arrays) for name, t in times.items()}
        found.append({"kernel": f"hadamard_quantize{bits}", "m": m, "k": k, "us": 1e6 * each["quantize"],
                      "copy_bytes_a_second": m * k * 4 / each["copy"], "bytes_a_second": moved / each["quantize"],
                      "of_copy_bandwidth": moved / each["quantize"] / (m * k * 4 / each["copy"]),
                      "of_roof": moved / roof.bandwidth / each["quantize"]})  # fmt: skip
    return found


def line(row: Mapping) -> str:
    return (
        f"{row['product']:8s} {row['m']:6d} {row['n']}x{row['k']} {row['kernel_us']:8.1f} us {row['ratio']:5.2f}x bf16"
        f" ({row['bfloat16_us']:.1f} us), {100 * row['of_roof']:.0f}% of the roof; XLA {row['xla_ratio']:.2f}x"
    )
