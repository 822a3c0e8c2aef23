"""Weights of every kind that files of other projects hold, and reading them as the formats' own documents say."""

import dataclasses

import jax.numpy as jnp
import numpy as np

import lowbit_jax as lb
from lowbit_jax.scaling import Block, CastScale, Group, PerRow, PerTensor, absmax, mean_abs, rms_optimal

K, N = 512, 24


def quantizer(fmt: str, tiling=None, **slots) -> lb.Quantizer:
    return lb.Quantizer(format=lb.formats.get(fmt), tiling=tiling or PerRow(), **{"fit": absmax} | slots)


def block(name: str, **slots) -> lb.Quantizer:
    return dataclasses.replace(lb.block_quantizer(lb.formats.get(name)), **slots)


INTEGERS = {
    **{f"int{bits} by groups": quantizer(f"int{bits}", Group(64)) for bits in range(1, 9)},
    **{f"int{bits} by rows": quantizer(f"int{bits}") for bits in range(1, 9)},
    **{f"mid-rise of {bits} bits": quantizer(f"midrise{bits}", fit=rms_optimal) for bits in range(1, 8)},
    "mid-tread": quantizer("midtread5"),
    "ternary": quantizer("ternary", PerTensor(), fit=mean_abs),
    "blocks": quantizer("int4", Block(64, 8)),
    "bfloat16 scales": quantizer("int4", Group(64), scale_format=lb.scaling.BFLOAT16),
    "e2m1 by rows": quantizer("e2m1", fit=rms_optimal),
    "sparse": lb.quest_quantizer(3, block=None, sparsity="2:4"),
}
ZERO_POINTS = {
    **{f"uint{bits}, zero points": quantizer(f"uint{bits}", Group(64), zero_point=True) for bits in range(1, 9)},
    **{f"int{bits}, zero points": quantizer(f"int{bits}", zero_point=True) for bits in range(2, 9)},
}
FP8 = {
    "fp8 by tensor": quantizer("e4m3", PerTensor()),
    "fp8 by rows": quantizer("e4m3"),
    "fp8 by groups": quantizer("e4m3", Group(128)),
    "fp8 by blocks": quantizer("e4m3", Block(128, 8)),
    "fp8 in powers of two": quantizer("e4m3", scale_format=lb.scaling.PowerOfTwo("rceil")),
}
MX = {
    **{name: block(name) for name in ("mxfp4", "mxfp6_e2m3", "mxfp8")},
    "mxfp4, scales even": block("mxfp4", scale_format=lb.scaling.PowerOfTwo("even")),
}
NVFP4 = {"nvfp4": block("nvfp4"), "nvfp4 in squares": block("nvfp4", tiling=Block(16, 8))}
ALL = INTEGERS | ZERO_POINTS | FP8 | MX | NVFP4


def weight(seed: int = 0, shape: tuple[int, ...] = (K, N)):
    """A kernel as Flax has it, inputs first, unevenly about 0 and with a row of zeros."""
    values = np.random.default_rng(seed).normal(0.1, 1, shape).astype(np.float32)
    values[..., 3] = 0
    return jnp.asarray(values)


def half(q: lb.Quantizer) -> lb.Quantizer:
    """With scales that float16 holds."""
    return dataclasses.replace(q, scale_format=CastScale("float16"))
