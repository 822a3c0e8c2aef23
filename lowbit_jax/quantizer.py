"""A quantizer is a format, a tiling, a fit and a rounding, seen through a rotation and answered by an estimator.

    x_hat = T^-1( scale * round(x T / scale) on the support )      or, with zero points z,
    x_hat = T^-1( scale * (round(x T / scale + z) - z) )

The record is frozen and hashable: it can be a static argument of a jitted function, and equal quantizers never retrace.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.dtypes import canonicalize_dtype
from jaxtyping import Array, Float

from lowbit_jax import coding, packing, rounding
from lowbit_jax.estimators import ClippedStraightThrough, Estimator, quantize_through
from lowbit_jax.estimators.base import at_the_edge
from lowbit_jax.formats.base import BlockFormat, Format, IntFormat
from lowbit_jax.formats.catalogue import INT8
from lowbit_jax.qtensor import QTensor
from lowbit_jax.rotation import Hadamard
from lowbit_jax.scaling import (
    FLOAT32,
    Block,
    CastScale,
    Eden,
    Fit,
    Group,
    Learned,
    PerRow,
    PerTensor,
    PowerOfTwo,
    ScaleFormat,
    Tiling,
    TwoLevel,
    absmax,
    rms_optimal,
    zero_point,
)
from lowbit_jax.scaling.fit import carries_nan, positive, reciprocal, rms_scales
from lowbit_jax.scaling.report import TileReport, tile_report
from lowbit_jax.scaling.tiling import Axis, join, normalized_axes
from lowbit_jax.slots import SLOTS
from lowbit_jax.sparsity import Support, compress

Rounding = Callable[..., Array]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, weakref_slot=True)
class Quantizer:
    """Composes the parts; every slot has a default, which is absmax INT8 for each row with a clipped gradient.

    Calling it is differentiable fake quantization; `quantize` gives the real, packed codes. In both, `axis` is the
    contraction axis of the product that `x` will enter (default: the last), along which rotation, groups and supports
    lie; statistics are float32 whatever the dtype of `x`, and the result has the shape and dtype of `x` (in float16 a
    level beyond 65504 is infinite).

    A scale that is not finite is NaN, and so is then its whole tile, packed or not. A learned scale acts by its
    magnitude, at least 2^-126. `key` feeds a stochastic rounding, of elements or of scales (`debias`), and fresh signs;
    the others do not read it (`uses_key`). `debias` corrects the scales behind a random rotation.
    `zero_point=True` moves each tile by a level of its own (`scaling.zero_point`), for data that lies unevenly about 0;
    the fit then sees the tile about its middle, and absmax spans it from end to end.
    Raises: TypeError for slots of the wrong kind and for arrays that are not floating; ValueError for an estimator
    that learns the scale beside a fit that reads it off the data, for a Learned fit beside one that does not, and for
    zero points of a grid that is not of integers, or beside a support, a rounding toward zero, a scale format that is
    no CastScale or a fit of magnitudes (all but absmax, CandidateSearch and fits of your own); likewise for a learned
    fit behind fresh signs, and for `debias` beside what `scaling.Eden` does not serve."""

    format: Format = INT8
    tiling: Tiling = PerRow()
    fit: Fit = absmax
    rounding: Rounding = rounding.nearest
    scale_format: ScaleFormat = FLOAT32
    rotation: Hadamard | None = None
    sparsity: Support | None = None
    estimator: Estimator = ClippedStraightThrough()
    zero_point: bool = False
    debias: Eden | None = None

    def __post_init__(self):
        if isinstance(self.format, BlockFormat):
            raise TypeError(
                f"Quantizer(format={self.format.name}): a block format fixes format, tile and scale together."
                " Use lb.block_quantizer(format) to get the whole quantizer."
            )
        for slot, wanted in SLOTS.items():
            wanted.check(slot, getattr(self, slot))
        learns = getattr(self.estimator, "learns_scale", None)  # an estimator from elsewhere may not say
        if learns is True and not self.learned:
            raise ValueError(
                f"Quantizer(estimator={self.estimator!r}): it learns the scale, but the fit {_name(self.fit)} reads it"
                " off the data, so its gradient would go nowhere. Use fit=Learned(), or another estimator."
            )
        if learns is False and self.learned:
            raise ValueError(
                f"Quantizer(fit=Learned(), estimator={self.estimator!r}): this estimator gives the scale no gradient,"
                " so nothing would be learned. Use LSQ() or PACT(), or a fit that reads the data, such as absmax."
            )
        if not isinstance(self.zero_point, bool):
            raise TypeError(f"Quantizer(zero_point={self.zero_point!r}): give True, for a level a tile that is 0.")
        if self.zero_point:
            zero_point.check(self.format, self.fit, self.rounding, self.scale_format, self.sparsity)
        if self.debias is not None:
            plain = not (self.learned or self.zero_point or self.sparsity is not None)
            self.debias.check(self.tiling, self.rounding, self.scale_format, plain)
        if self.learned and self.fresh_signs:
            raise ValueError(
                f"Quantizer(fit=Learned(), {self.drawn}): a learned scale is fitted before any key is there. Fix the"
                " signs by a seed, as in Hadamard(signs=0), or use a fit that reads the data."
            )

    @property
    def learned(self) -> bool:
        """Whether the scale is a parameter that the caller holds and passes as `scale=`."""
        return isinstance(self.fit, Learned)

    @property
    def element_format(self) -> Format | None:
        """The grid of `elements`: the format, or distances on it from a zero point; None for those of 8 bits, which are
        more values than a code has."""
        return zero_point.distances(self._integers) if self.zero_point else self.format

    @property
    def fresh_signs(self) -> bool:
        """Whether the rotation draws its signs from the key."""
        return getattr(self.rotation, "fresh", False)

    @property
    def drawn(self) -> str:
        """The slot, if any, whose part is drawn from the key beside a rounding of elements; it has no packed form."""
        return f"rotation={self.rotation}" if self.fresh_signs else f"debias={self.debias}" if self.debias else ""

    @property
    def needs_key(self) -> bool:
        """Whether a call without a `key` raises: for stochastic rounding, of elements or scales, and fresh signs."""
        return self.rounding is rounding.stochastic or bool(self.drawn)

    @property
    def uses_key(self) -> bool:
        """Whether a `key` may be read: by a rounding other than `nearest` and `toward_zero`, or as `needs_key` says."""
        return self.needs_key or self.rounding not in (rounding.nearest, rounding.toward_zero)

    def _keys(self, key: Array | None) -> tuple[Array | None, Array | None]:
        """Of the signs and of the rounding: parts of the key where both are drawn."""
        if not self.fresh_signs or key is None:
            return None, key
        signs, rest = jax.random.split(key)
        return signs, rest

    def __call__(
        self, x: Float[Array, "*s"], *, axis: Axis = -1, key: Array | None = None, scale: Array | None = None
    ) -> Float[Array, "*s"]:
        """Fake quantization: an array near `x`, on the grid in the rotated space; gradient by the estimator."""
        quantized = self.in_rotated_space(x, axis=axis, key=key, scale=scale)
        return self.unrotated(quantized, axis=axis, key=key).astype(canonicalize_dtype(x.dtype))

    def in_rotated_space(
        self, x: Float[Array, "*s"], *, axis: Axis = -1, key: Array | None = None, scale: Array | None = None
    ) -> Float[Array, "*s"]:
        """Fake quantization without the way back: float32, for a product whose other operand is rotated alike."""
        return self.with_scale(x, axis=axis, key=key, scale=scale)[0]

    def with_scale(
        self, x: Float[Array, "*s"], *, axis: Axis = -1, key: Array | None = None, scale: Array | None = None
    ) -> tuple[Float[Array, "*s"], Float[Array, "*#tiles"]]:
        """`in_rotated_space`, and the scales in the view of the tiling, which gradients do not pass."""
        h, tiles, axes, scale, inv_scale, support, zero = self._fitted(x, axis, scale, key)
        _, key = self._keys(key)
        out = quantize_through(self.estimator, self.format, self.rounding, tiles, scale, support, key, inv_scale, zero)
        return join(cast(Array, out), h.shape), lax.stop_gradient(scale)  # `jax.custom_vjp` hides the type

    def unrotated(self, y: Float[Array, "*s"], *, axis: Axis = -1, key: Array | None = None) -> Float[Array, "*s"]:
        """The way back from the rotated space that the same key leads to."""
        if self.rotation is None:
            return y
        drawn: dict[str, Any] = {"key": self._keys(key)[0]} if self.fresh_signs else {}
        return self.rotation.undo(y, normalized_axes(axis, y.ndim, "Quantizer")[-1], **drawn)

    def elements(
        self, x: Float[Array, "*s"], *, axis: Axis = -1, key: Array | None = None, scale: Array | None = None
    ) -> tuple[Float[Array, "*s"], Float[Array, "*#tiles"]]:
        """The grid value of each element, from its zero point, in the rotated space, and the scales in the view of the
        tiling.

        Their product (where the tiling leaves the shape as it is) is `in_rotated_space(x)`, but for a NaN in a tile of
        a learned scale, which makes all of it NaN; no gradient passes."""
        h, tiles, axes, scale, inv_scale, support, zero = self._fitted(x, axis, scale, key)
        _, key = self._keys(key)
        _, values = self._on_grid(tiles, inv_scale, support, key, zero)
        values = values if zero is None else values - zero
        if self.learned:
            scale = _nan_of(tiles, axes, scale)
        return lax.stop_gradient((join(values, h.shape), scale))

    def factors(
        self, x: Float[Array, "*s"], *, axis: Axis = -1, key: Array | None = None
    ) -> tuple[Float[Array, "*s"], Float[Array, "*#tiles"], Any]:
        """`elements`, and what `pull_back` needs, for a product with a gradient rule of its own
        (`ops.coded_product`): one scale a row or a tensor, and none learned."""
        assert isinstance(self.tiling, PerRow | PerTensor) and not self.fresh_signs, self
        _, tiles, _, scale, inv_scale, support, zero = self._fitted(x, axis, None, with_gradient=False)
        u, values = self._on_grid(tiles, inv_scale, support, key, zero)
        if zero is None:
            return values, scale, self.estimator.residuals(u, values, self.format, support)
        kept = self.estimator.residuals(at_the_edge(u, values, self.format), values, self.format, support)
        return values - zero, scale, kept

    def pull_back(self, residuals: Any, g: Float[Array, "*s"], *, axis: Axis = -1) -> Float[Array, "*s"]:
        """The cotangent of x, float32, for the cotangent g of the product of both `factors`."""
        tiles, axes = self.tiling.split(g.astype(jnp.float32), axis)
        dx, _ = self.estimator.gradients(residuals, tiles, self.format, math.prod(tiles.shape[a] for a in axes))
        if self.rotation is None:
            return dx
        return self.rotation.undo(dx, normalized_axes(axis, g.ndim, "Quantizer")[-1], with_gradient=False)

    def quantize(
        self, x: Float[Array, "*s"], *, axis: int = -1, key: Array | None = None, scale: Array | None = None
    ) -> QTensor:
        """The packed codes and stored scales of `x`: `dequantize` gives what calling the quantizer gives.

        But for one case: a NaN in a tile whose scale is learned has no code, so that it makes the whole tile NaN.
        Raises: ValueError when `axis` names several axes (a packed row lies along one); NotImplementedError for fresh
        signs and a corrected scale, of which a packed array would keep one draw."""
        return self.quantize_by(lambda u, _: self.rounding(u, self.format, key), x, axis=axis, scale=scale)

    def quantize_by(
        self, choose: Callable[[Array, Array], Array], x: Float[Array, "*s"], *, axis: int = -1,
        scale: Array | None = None,
    ) -> QTensor:  # fmt: skip
        """`quantize` with other levels of the format: those of `choose(u, scale)`, in the view of the tiling as u and
        the scales are; u is x, rotated, over its scale, from its zero point. Levels off a support are left out."""
        if self.drawn:
            raise NotImplementedError(
                f"Quantizer({self.drawn}) has no packed form, which would keep one draw of what averages out over many."
                " Use it in backward products, and in what is packed Hadamard(signs=0) and no debias."
            )
        if isinstance(axis, tuple | list):
            raise ValueError(
                f"Quantizer.quantize packs along one axis, got {axis}. Merge the axes, or use the array itself."
            )
        h, tiles, axes, scale, inv_scale, support, zero = self._fitted(x, axis, scale, None, rounded=False)
        if self.learned:  # other fits have seen it
            scale = _nan_of(tiles, axes, scale)
        (at,) = normalized_axes(axis, x.ndim, "Quantizer")
        stored = self.scale_format.store(scale, self.format)
        if self.scale_format != FLOAT32 or self.learned:
            inv_scale = reciprocal(self.scale_format.load(stored))
        u = tiles * inv_scale if zero is None else tiles * inv_scale + zero
        rounded = choose(u, self.scale_format.load(stored))
        codes = jnp.moveaxis(coding.encode(join(rounded, h.shape), self.format), at, -1)
        marks = None
        if support is not None:
            assert self.sparsity is not None
            mask = jnp.moveaxis(join(support, h.shape), at, -1)
            codes, marks = compress(codes, mask, self.sparsity)
            marks = packing.pack(marks, 1)
        return QTensor(
            words=packing.pack(codes, self.format.bits),
            scales=stored,
            marks=marks,
            quantizer=self,
            axis=at - x.ndim,
            length=x.shape[at],
            dtype=canonicalize_dtype(x.dtype),
            zeros=None if zero is None else zero_point.stored(zero, self._integers),
        )

    def initial_scale(self, x: Float[Array, "*s"], *, axis: Axis = -1) -> Float[Array, "*tiles"]:
        """Starting value of a learned scale, fitted to `x`: shape () for a tensor, else one entry a tile.

        Raises: ValueError when the fit is not learned."""
        if not isinstance(self.fit, Learned):
            raise ValueError(
                f"Quantizer.initial_scale: the fit {_name(self.fit)} reads its scale off the data; nothing to hold."
            )
        _, tiles, axes = self._tiles(x, axis)
        scale = self.fit.initial(tiles, self.format, axes)
        return scale.reshape([n for a, n in enumerate(tiles.shape) if a not in axes])

    def report(
        self, x: Float[Array, "*s"], *, axis: Axis = -1, key: Array | None = None, scale: Array | None = None
    ) -> TileReport:
        """How well each tile of `x` is kept and how far its largest element stands out: a `scaling.TileReport`.

        Tiles are looked at as they are quantized, so behind the rotation."""
        h, tiles, axes, scale, inv_scale, support, zero = self._fitted(x, axis, scale, key)
        _, key = self._keys(key)
        near = quantize_through(self.estimator, self.format, self.rounding, tiles, scale, support, key, inv_scale, zero)
        return tile_report(tiles, jnp.asarray(near), axes)

    def _tiles(self, x, axis, key=None, with_gradient=True):
        if isinstance(x, QTensor):
            raise TypeError(f"Quantizer got {x!r}, which is quantized already. Pass x.dequantize() to do it anew.")
        if not hasattr(x, "dtype") or not hasattr(x, "ndim"):
            raise TypeError(f"Quantizer got a {type(x).__name__}; it takes arrays: pass jnp.asarray(x).")
        if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            raise TypeError(
                f"Quantizer got an array of {jnp.result_type(x)}; it quantizes floating arrays."
                " Cast first, as in x.astype(jnp.float32)."
            )
        if x.ndim == 0:
            raise ValueError("Quantizer got a scalar; it needs at least the contraction axis. Reshape to (1,).")
        axes = normalized_axes(axis, x.ndim, "Quantizer")
        if self.rotation is None:
            h = x.astype(jnp.float32)
        else:
            told: dict[str, Any] = {} if with_gradient else {"with_gradient": False}
            told |= {"key": key} if self.fresh_signs else {}
            h = self.rotation.apply(x, axes[-1], **told)
        return h, *self.tiling.split(h, axes)

    @property
    def _integers(self) -> IntFormat:
        assert isinstance(self.format, IntFormat), "only these take zero points"
        return self.format

    def _on_grid(self, tiles, inv_scale, support, key, zero):
        """x / scale, from the zero point, and the grid values, zero off the support."""
        u = lax.mul(tiles, lax.broadcast_in_dim(inv_scale, tiles.shape, range(tiles.ndim)))
        u = u if zero is None else u + zero
        values = self.rounding(u, self.format, key)
        return u, values if support is None else jnp.where(support, values, jnp.zeros_like(values))

    def _fitted(self, x, axis, scale, key=None, rounded=True, with_gradient=True):
        signs_key, key = self._keys(key)
        h, tiles, axes = self._tiles(x, axis, signs_key, with_gradient)
        tile_scale_shape = tuple(1 if a in axes else n for a, n in enumerate(tiles.shape))
        center = lax.stop_gradient(zero_point.centers(tiles, axes)) if self.zero_point else None
        if isinstance(self.fit, Learned):
            if scale is None:
                self.fit(tiles, self.format, axes)
            scale = positive(_as_tile_scale(scale, tile_scale_shape))
        elif scale is not None:
            raise ValueError(
                f"Quantizer got `scale=`, but its fit {_name(self.fit)} reads the scale off the data."
                " Drop the argument, or use fit=Learned()."
            )
        else:
            whole_rows = isinstance(self.tiling, PerRow | PerTensor)
            if self.fit is rms_optimal and self.rotation is not None and whole_rows:
                seen = x.astype(jnp.float32)  # a rotation keeps the rms of whole rows, and x is at hand before h
            else:
                seen = tiles
            seen = lax.stop_gradient(seen) if with_gradient else seen
            if self.fit is rms_optimal:
                scale, inv_scale = rms_scales(seen, self.format, axes)
            else:
                if center is None:
                    scale = lax.stop_gradient(self.fit(seen, self.format, axes))
                else:
                    noisy = self.rounding is rounding.stochastic
                    scale = lax.stop_gradient(zero_point.fitted(self.fit, seen, center, self._integers, axes, noisy))
                _check_fitted(self.fit, scale, tile_scale_shape)
                if not carries_nan(self.fit):
                    scale = lax.stop_gradient(_nan_of(tiles, axes, scale))
        if self.fit is not rms_optimal:  # whose scales are finite or NaN
            scale = jnp.where(jnp.isfinite(scale), scale, jnp.nan)
        if isinstance(self.scale_format, TwoLevel):  # the 1 of a tile of zeros would count in the tensor's scale
            scale = jnp.where(jnp.any(lax.stop_gradient(tiles) != 0, axis=axes, keepdims=True), scale, 0.0)
        codes = ()
        if rounded and self.scale_format != FLOAT32:
            codes = self.scale_format.store(lax.stop_gradient(scale), self.format)
            stored = self.scale_format.load(codes)
            # a difference of 0 carries the gradient; stored - scale would lose a scale far beyond what is stored
            scale = stored + (scale - lax.stop_gradient(scale)) if self.learned else stored
        if self.fit is not rms_optimal or self.scale_format != FLOAT32:
            inv_scale = reciprocal(scale)
        if rounded and self.debias is not None:  # inv_scale stays that of the scale under which elements are nearest
            u, values = self._on_grid(lax.stop_gradient(tiles), inv_scale, None, None, None)
            scale = self.scale_format.load(self.debias.corrected(u, values, axes, codes, self.scale_format, key))
        support = None
        if self.sparsity is not None:
            mask = self.sparsity.mask(lax.stop_gradient(h), normalized_axes(axis, x.ndim, "Quantizer")[-1])
            support = mask.reshape(tiles.shape)
        zero = None
        if center is not None:  # of the scale as it is stored
            kept = scale if rounded else self.scale_format.load(self.scale_format.store(scale, self.format))
            zero = zero_point.zero_points(center, kept, self._integers)
        return h, tiles, axes, scale, inv_scale, support, zero

    def explain(self, length: int | None = None) -> dict[str, str]:
        """The slots in words; `length`, the contraction size, settles the rotation's block."""
        return {
            "format": self.format.name,
            "tiling": self.tiling.describe(),
            "fit": _name(self.fit),
            "rounding": _name(self.rounding),
            "scale_format": self.scale_format.describe(),
            "rotation": "none" if self.rotation is None else self.rotation.describe(length),
            "sparsity": "dense" if self.sparsity is None else self.sparsity.describe(),
            "estimator": self.estimator.describe(),
            **({"zero_point": f"{self.format.bits} bits"} if self.zero_point else {}),
            **({"debias": self.debias.describe()} if self.debias is not None else {}),
            "bits_per_element": f"{self.element_bits():g}",
        }

    def element_bits(self) -> float:
        """Storage bits of an element without its share of the scale; a support's marks are counted."""
        if self.sparsity is None:
            return float(self.format.bits)
        return self.format.bits * self.sparsity.kept / self.sparsity.group + 1 / self.sparsity.run


def _nan_of(tiles: Float[Array, "*tiles"], axes: tuple[int, ...], scale: Float[Array, "*scales"]) -> Array:
    """The scale, and NaN where an element of its tile is NaN."""
    return jnp.where(jnp.any(jnp.isnan(tiles), axis=axes, keepdims=True), jnp.nan, scale)


def _check_fitted(fit: Any, scale: Any, shape: tuple[int, ...]) -> None:
    """Raises: ValueError for scales that are not one a tile."""
    found = jnp.shape(scale)
    if found != shape and math.prod(found) != 1:
        raise ValueError(
            f"Quantizer: the fit {_name(fit)} answered scales of shape {found} for tiles of {shape}. A fit keeps the"
            " axes that it is given, with length 1: use keepdims=True."
        )


def _as_tile_scale(scale: Array, shape: tuple[int, ...]) -> Array:
    scale = jnp.asarray(scale, jnp.float32)
    long = lambda sides: [n for n in sides if n != 1]
    if scale.size != 1 and long(scale.shape) != long(shape):
        count = math.prod(shape)
        raise ValueError(f"Quantizer got a scale of shape {scale.shape}; this tiling has {count} tiles, shape {shape}.")
    return jnp.broadcast_to(scale.reshape([1] * len(shape)), shape) if scale.size == 1 else scale.reshape(shape)


def _name(part) -> str:
    return getattr(part, "__name__", None) or str(part)


def block_quantizer(fmt: BlockFormat, **slots) -> Quantizer:
    """The quantizer that a block format fixes: its elements, tile and scale format; `slots` set the rest.

    Raises: TypeError for a format that is not a block format."""
    if not isinstance(fmt, BlockFormat):
        raise TypeError(
            f"block_quantizer({fmt!r}): give a block format, such as lb.formats.MXFP4; others go to Quantizer."
        )
    tiling = Group(fmt.block) if isinstance(fmt.block, int) else Block(*fmt.block)
    if fmt.tensor_scale:
        scale_format = TwoLevel(fmt.scale)
    elif fmt.scale.mantissa_bits:
        scale_format = CastScale(fmt.scale.dtype)
    else:
        scale_format = PowerOfTwo(fmt.scale_rounding)
    fixed: dict[str, Any] = dict(format=fmt.element, tiling=tiling, fit=absmax, scale_format=scale_format)
    return Quantizer(**fixed | slots)
