"""The one door to `pallas_kernels`: which products run as a kernel, chosen while tracing, and XLA for all others.

"auto" asks the platform that the program is compiled for: a kernel on an NVIDIA GPU of compute capability 8.0 or later,
the XLA reference on everything else, and where XLA would have to cut a kernel over several devices, which it cannot: it
would run all of it on each. On a machine whose JAX has no such GPU the reference is taken at once, so that CPU programs
are not slower to trace. Gradients are those of the reference. Nothing here touches a device at import.
"""

import functools
import importlib.util
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType
from jaxtyping import Array, Int, UInt8

IMPLEMENTATIONS = ("auto", "kernel", "reference", "interpret")
LEAST_CAPABILITY = (8, 0)  # Ampere: bfloat16 and asynchronous copies
MOST_ELEMENTS = 2**31 - 1  # of an array, which kernels count in 32 bits
LONGEST_INT8 = (2**31 - 1) // 2**14  # terms of a sum of products of int8 that int32 holds
DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)  # that kernels return, and that `hadamard_quantize` reads
_OLDER = {  # NVIDIA's chips before it, by a part of their device kind
    r"\bT\d|RTX 20|GTX 16|TITAN RTX|Quadro RTX": (7, 5), r"\bV100|TITAN V\b|GV100": (7, 0),
    r"\bP(4|40|100)\b|GTX 10|TITAN X": (6, 0), r"\bM(4|40|60)\b|GTX 9": (5, 2), r"\bK(20|40|80)": (3, 5),
}  # fmt: skip


def available() -> bool:
    """Whether the kernels are installed."""
    return importlib.util.find_spec("pallas_kernels") is not None


def platform() -> str:
    """The platform that programs traced now are for: that of an abstract device, if there is one, else the default."""
    told = _abstract_device()
    return jax.default_backend() if told is None else told.platform


def _abstract_device() -> Any:
    return getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)


def sees_gpu() -> bool:
    """Whether programs traced now may be compiled for a GPU that the kernels run on."""
    return why_no_gpu() is None


def why_no_gpu() -> str | None:
    """Why programs traced now cannot run the kernels, whether their GPU is real or, ahead of time, abstract; None when
    they can."""
    if platform() != "gpu":
        return f"JAX runs on {platform()} here, and the kernels need an NVIDIA GPU"
    told = _abstract_device()
    device = jax.devices()[0] if told is None else told
    kind = device.device_kind
    capability = getattr(device, "compute_capability", None)  # an abstract device has none
    number = _capability(kind, capability)
    if number is None:
        return f"the GPU here, {kind}, is not one of NVIDIA's, and the kernels need one"
    if number < LEAST_CAPABILITY:
        major, minor = number
        return f"{kind} has compute capability {major}.{minor}, and the kernels need {LEAST_CAPABILITY[0]}.0 or later"
    return None


def _capability(kind: str, told: Any) -> tuple[int, int] | None:
    """The compute capability of a GPU from what its device says, else from its name; None for other makers' GPUs."""
    if told is not None:  # "9.0" on CUDA, "gfx942" on ROCm
        numbers = re.fullmatch(r"(\d+)\.(\d+)", str(told))
        return (int(numbers[1]), int(numbers[2])) if numbers else None
    for pattern, capability in _OLDER.items():
        if re.search(pattern, kind):
            return capability
    return LEAST_CAPABILITY if kind.startswith("NVIDIA") else None


def why_partitioned(*operands: Any) -> str | None:
    """Why XLA would cut the program that `operands` belong to over several devices; None when it is for one, or when
    each device runs its own (inside `jax.shard_map`, with all axes of more than one device manual).

    The mesh is that of the context or that of the operands. Without either, a process that has several devices may be
    tracing for all of them (`in_shardings` do not show), so it counts as doing so."""
    ambient = jax.sharding.get_abstract_mesh()
    of_operands = [getattr(jax.typeof(leaf), "sharding", None) for leaf in jax.tree.leaves(operands)]
    meshes = [ambient, *(sharding.mesh for sharding in of_operands if sharding is not None)]
    meshes = [mesh for mesh in meshes if mesh.axis_names]
    for mesh in meshes:
        cut = [
            f"{name}={size}"
            for (name, size), kind in zip(mesh.shape.items(), mesh.axis_types, strict=True)
            if size > 1 and kind != AxisType.Manual
        ]
        if cut:
            return f"XLA does not cut kernels over the devices of a mesh ({', '.join(cut)}); jax.shard_map does"
    if meshes or getattr(ambient, "abstract_device", None) is not None or jax.device_count() == 1:
        return None
    return (
        f"JAX has {jax.device_count()} devices, and nothing says that the program is for one of them (a mesh of one"
        " device in jax.set_mesh does)"
    )


def takes_kernel(*operands: Any) -> bool:
    """Whether "auto" takes a kernel for these operands, if there is one."""
    return available() and sees_gpu() and why_partitioned(*operands) is None


def why_not_dtype(what: str, dtype: Any) -> str | None:
    """Why kernels neither return nor round arrays of this dtype; None when they do."""
    return None if dtype in DTYPES else f"{what} is {dtype}, and the kernels know bfloat16, float16 and float32"


def choose(
    kernel: Callable, reference: Callable, *operands: Any, implementation: str, why_not: str | None, who: str
) -> Any:
    """`kernel(impl, *operands)` or `reference(*operands)`.

    Raises: NotImplementedError when "kernel" is asked for and cannot run, saying why."""
    if implementation in ("kernel", "interpret"):
        if why_not is None and not available():
            why_not = "the package pallas_kernels is not installed"
        if why_not is None and implementation == "kernel":
            why_not = why_no_gpu()
        if why_not is not None:
            raise NotImplementedError(
                f"{who}: no kernel for this product: {why_not}. Use implementation='auto' to let XLA compute it."
            )
        return kernel("triton" if implementation == "kernel" else "interpret", *operands)
    if implementation == "reference" or why_not is not None or not takes_kernel(*operands):
        return reference(*operands)
    return lax.platform_dependent(*operands, cuda=functools.partial(kernel, "triton"), default=reference)


def pack_planes(codes: UInt8[Array, "n k"], bits: int, word_bits: int) -> tuple[Array, ...]:
    """The word arrays of the layout "planes/1"."""
    return _planes().pack(codes, bits, word_bits)


def unpack_planes(words: tuple[Int[Array, "_ _ 32"], ...], bits: int, n: int, k: int) -> UInt8[Array, "n k"]:
    """The codes of `pack_planes`."""
    return _planes().unpack(tuple(words), bits, n, k)


def _planes() -> Any:
    if not available():
        raise NotImplementedError(
            "weights in the layout 'planes/1' need the package pallas_kernels, which is not installed."
        )
    from pallas_kernels import planes

    return planes


def matmul_a16(
    impl: str, x: Array, words: tuple[Array, ...], scales: Array, zeros: Any, bits: int, out_dtype: Any
) -> Array:
    """x [M, K] in bfloat16 or float16 times packed [N, K], transposed; scales [groups, N]. zeros: the code of
    value 0, or an array like the scales."""
    from pallas_kernels.matmul_a16 import matmul_a16 as run

    group = None if scales.shape[0] == 1 else x.shape[1] // scales.shape[0]
    return run(x, words, scales, zeros, bits=bits, group=group, out_dtype=out_dtype, impl=impl)


def matmul_a8(
    impl: str, codes: Array, x_scales: Array, x_sums: Any, x_zero: float, words: tuple[Array, ...], scales: Array,
    zero: float, sums: Array, bits: int, out_dtype: Any,
) -> Array:  # fmt: skip
    """int8 codes [M, K] times packed [N, K], transposed; exact sums. x_sums: of the rows' codes, None to compute."""
    from pallas_kernels.matmul_a8 import matmul_a8 as run

    return run(
        codes,
        x_scales,
        words,
        scales,
        bits=bits,
        x_zero=x_zero,
        w_zero=zero,
        x_sums=x_sums,
        w_sums=sums,
        out_dtype=out_dtype,
        impl=impl,
    )


def matmul_mx(
    impl: str, x: Array, words: Array, scales: Array, x_scales: Any, *, format: Any, x_format: Any, across: bool,
    out_dtype: Any,
) -> Array:  # fmt: skip
    """x [M, K] in bfloat16, or microscaled, times microscaled [N, K], transposed."""
    from pallas_kernels.matmul_mx import matmul_mx as run

    assert impl == "triton", "`why_no_mx` refuses interpretation"
    dtype = out_dtype if out_dtype == jnp.bfloat16 else jnp.float32
    y = run(
        x, words, scales, x_scales, format=format, x_format=x_format, scales_across=across, out_dtype=dtype,
        impl="jax-triton",
    )  # fmt: skip
    return y.astype(out_dtype)


def has_fp8() -> bool:
    """Whether programs traced now are for an NVIDIA GPU with FP8 tensor cores."""
    if platform() != "gpu" or not available():
        return False
    from pallas_kernels import chips

    return chips.traced_capability() >= chips.FP8


def why_no_mx(*formats: str | None) -> str | None:
    """Why the kernel for microscaled operands cannot run here; None when it can, on the GPU traced for."""
    if not available():
        return "the package pallas_kernels is not installed"
    from pallas_kernels import chips, matmul_mx

    if any(name is not None and name.startswith("mxfp8") for name in formats) and chips.traced_capability() < (8, 9):
        return "FP8 elements need compute capability 8.9"
    return matmul_mx.why_not()


def matmul_i8(
    impl: str, x: Array, w: Array, x_scales: Array, w_scales: Array, x_sums: Any, w_sums: Any, *, x_offset: float,
    w_offset: float, out_dtype: Any,
) -> Array:  # fmt: skip
    """int8 codes [M, K] times int8 codes [N, K], transposed; exact sums, scaled."""
    from pallas_kernels.matmul_i8 import best
    from pallas_kernels.matmul_i8 import matmul_i8 as run

    if impl == "triton":
        impl = best(x.shape[0], w.shape[0], x.shape[1])
    return run(
        x,
        w,
        x_scales,
        w_scales,
        x_offset=x_offset,
        w_offset=w_offset,
        x_sums=x_sums,
        w_sums=w_sums,
        out_dtype=out_dtype,
        impl=impl,
    )


def hadamard_quantize(
    impl: str,
    x: Array,
    *,
    bits: int,
    alpha: float,
    block: int | None,
    midrise: bool,
    trust: float | None,
    packed: bool = False,
) -> Any:
    """(int8 codes [M, K], scales [M], sums of the codes [M], packed trust mask, packed words) of the rows of x."""
    from pallas_kernels.hadamard_quantize import hadamard_quantize as run

    return run(x, bits=bits, alpha=alpha, block=block, midrise=midrise, trust=trust, packed=packed, impl=impl)


def hadamard_backward(impl: str, g: Array, mask: Array, *, block: int | None, out_dtype: Any, axis: int = 1) -> Array:
    """(g * mask) rotated back, [M, K], or [K, M] with axis=0."""
    from pallas_kernels.hadamard_backward import hadamard_backward as run

    return run(g, mask, block=block, out_dtype=out_dtype, axis=axis, impl=impl)


def has_both_ways(m: int, n: int, dtype: Any) -> bool:
    """Whether a measurement on this GPU found the kernel below faster than XLA at this size (`benchmarks.gpu` stores
    the tile of one that is)."""
    from pallas_kernels import both_ways, tuning

    return tuning.lookup(both_ways.tuning_key(m, n, dtype)) is not None


def quantize_both_ways(impl: str, g: Array, along_columns: Array, along_rows: Array) -> Any:
    """int8 codes and scales of g's rows and of its columns, each weighted."""
    from pallas_kernels.both_ways import quantize_both_ways as run

    return run(g, along_columns, along_rows, impl=impl)
