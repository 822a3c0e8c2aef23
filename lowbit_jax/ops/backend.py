"""The one door to `pallas_kernels`: which products run as a kernel, chosen while tracing, and XLA for all others.

"auto" asks the platform that the program is compiled for: a kernel on CUDA, the XLA reference on everything else. On a
machine whose JAX has no GPU the reference is taken at once, so that CPU programs are not slower to trace. Gradients are
those of the reference.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jaxtyping import Array, Int, UInt8

IMPLEMENTATIONS = ("auto", "kernel", "reference", "interpret")


def available() -> bool:
    """Whether the kernels are installed."""
    return importlib.util.find_spec("pallas_kernels") is not None


def sees_gpu() -> bool:
    """Whether programs traced now may be compiled for a GPU: a real one, or an abstract one, ahead of time."""
    mesh_device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return getattr(mesh_device, "platform", None) == "gpu" or jax.default_backend() == "gpu"


def choose(
    kernel: Callable, reference: Callable, *operands: Any, implementation: str, why_not: str | None, who: str
) -> Any:
    """`kernel(impl, *operands)` or `reference(*operands)`.

    Raises: NotImplementedError when "kernel" is asked for and cannot run, saying why."""
    if implementation in ("kernel", "interpret"):
        if why_not is None and not available():
            why_not = "the package pallas_kernels is not installed"
        if why_not is None and implementation == "kernel" and not sees_gpu():
            why_not = f"JAX runs on {jax.default_backend()} here, and the kernels need an NVIDIA GPU"
        if why_not is not None:
            raise NotImplementedError(
                f"{who}: no kernel for this product: {why_not}. Use implementation='auto' to let XLA compute it."
            )
        return kernel("triton" if implementation == "kernel" else "interpret", *operands)
    if implementation == "reference" or why_not is not None or not available() or not sees_gpu():
        return reference(*operands)
    return lax.platform_dependent(*operands, cuda=functools.partial(kernel, "triton"), default=reference)


def pack_planes(codes: UInt8[Array, "n k"], bits: int, word_bits: int) -> tuple[Array, ...]:
    """The word arrays of the layout "planes/1"."""
    return _planes().pack(codes, bits, word_bits)


def unpack_planes(words: tuple[Int[Array, "blocks rows 32"], ...], bits: int, n: int, k: int) -> UInt8[Array, "n k"]:
    """The codes of `pack_planes`."""
    return _planes().unpack(tuple(words), bits, n, k)


def _planes() -> Any:
    if not available():
        raise NotImplementedError(
            "weights in the layout 'planes/1' need the package pallas_kernels, which is not installed."
        )
    from pallas_kernels import planes

    return planes


def matmul_a16(impl: str, x: Array, words: tuple[Array, ...], scales: Array, zero: float, bits: int) -> Array:
    """x [M, K] in bfloat16 or float16 times packed [N, K], transposed; scales [groups, N]."""
    from pallas_kernels.matmul_a16 import matmul_a16 as run

    group = None if scales.shape[0] == 1 else x.shape[1] // scales.shape[0]
    return run(x, words, scales, zero, bits=bits, group=group, impl=impl)


def matmul_a8(
    impl: str, codes: Array, x_scales: Array, x_zero: float, words: tuple[Array, ...], scales: Array, zero: float,
    sums: Array, bits: int, out_dtype: Any,
) -> Array:  # fmt: skip
    """int8 codes [M, K] times packed [N, K], transposed; exact sums."""
    from pallas_kernels.matmul_a8 import matmul_a8 as run

    return run(
        codes,
        x_scales,
        words,
        scales,
        bits=bits,
        x_zero=x_zero,
        w_zero=zero,
        w_sums=sums,
        out_dtype=out_dtype,
        impl=impl,
    )


def hadamard_quantize(
    impl: str, x: Array, *, bits: int, alpha: float, block: int | None, midrise: bool, trust: float | None, axis: int
) -> tuple[Array, Array, Any]:
    """int8 codes [M, K], scales [M] and the packed trust mask of the rows of x (its columns with axis=0)."""
    from pallas_kernels.hadamard_quantize import hadamard_quantize as run

    return run(x, bits=bits, alpha=alpha, block=block, midrise=midrise, trust=trust, axis=axis, impl=impl)


def hadamard_backward(impl: str, g: Array, mask: Array, *, block: int | None, out_dtype: Any) -> Array:
    """(g * mask) rotated back, [M, K]."""
    from pallas_kernels.hadamard_backward import hadamard_backward as run

    return run(g, mask, block=block, out_dtype=out_dtype, impl=impl)
