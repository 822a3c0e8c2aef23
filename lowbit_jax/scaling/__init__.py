"""How large is one grid step, and which elements share it?"""

from lowbit_jax.scaling.eden import Eden
from lowbit_jax.scaling.finite import check_finite, first_nonfinite
from lowbit_jax.scaling.fit import (
    AbsmaxOn,
    CandidateSearch,
    Fit,
    Learned,
    Percentile,
    absmax,
    absmax_edge,
    mean_abs,
    rms_optimal,
)
from lowbit_jax.scaling.gaussian import gaussian_mse, optimal_clip, optimal_scale
from lowbit_jax.scaling.report import OUTLIER_RATIO, TileReport, tile_report
from lowbit_jax.scaling.scale_format import BFLOAT16, FLOAT32, CastScale, PowerOfTwo, ScaleFormat, TwoLevel
from lowbit_jax.scaling.tiling import Block, Group, PerRow, PerTensor, Tiling, UnevenTiles

__all__ = [
    "BFLOAT16",
    "FLOAT32",
    "OUTLIER_RATIO",
    "AbsmaxOn",
    "Block",
    "CandidateSearch",
    "CastScale",
    "Eden",
    "Fit",
    "Group",
    "Learned",
    "PerRow",
    "PerTensor",
    "Percentile",
    "PowerOfTwo",
    "ScaleFormat",
    "TileReport",
    "Tiling",
    "TwoLevel",
    "UnevenTiles",
    "absmax",
    "absmax_edge",
    "check_finite",
    "first_nonfinite",
    "gaussian_mse",
    "mean_abs",
    "optimal_clip",
    "optimal_scale",
    "rms_optimal",
    "tile_report",
]
