"""Where a step lands: reading a parameter in float32, rounding a new value to what the parameter can hold, and the
update that gets there.

Parameters are arrays (of float32, 16 or 8 bits) or packed weights (`QTensor`).
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lowbit_jax import coding, packing, rounding
from lowbit_jax.formats.base import BlockFormat, Format
from lowbit_jax.optim import trees
from lowbit_jax.optim.sixteen_bit import format_of, on_grid_of
from lowbit_jax.qtensor import QTensor
from lowbit_jax.quantizer import Quantizer, block_quantizer
from lowbit_jax.scaling import PerRow, PerTensor, absmax, mean_abs
from lowbit_jax.scaling.fit import reciprocal
from lowbit_jax.scaling.tiling import join

ParamFormat = Format | BlockFormat | Quantizer | None

KEEP_SCALE = 2.0**-20  # a scale that moved by less, relatively, is the old one: a step of zero leaves the codes alone


def param_quantizer(param_format: ParamFormat, who: str) -> Quantizer | None:
    """The quantizer of the weights: a format with its usual scale (ternary and 1 bit: mean magnitude of the tensor,
    others: absmax of each output channel, which an [in, out] kernel has along its last axis), or as given.

    Raises: TypeError for anything else; ValueError for one with a learned scale, rotation, sparsity, zero points or
    debias."""
    if param_format is None:
        return None
    if isinstance(param_format, BlockFormat):
        param_format = block_quantizer(param_format)
    elif isinstance(param_format, Format):
        few = len(param_format.levels) <= 3
        param_format = (
            Quantizer(format=param_format, tiling=PerTensor(), fit=mean_abs)
            if few
            else Quantizer(format=param_format, tiling=PerRow(), fit=absmax)
        )
    if not isinstance(param_format, Quantizer):
        raise TypeError(
            f"{who}(param_format={param_format!r}): give a format (lb.formats.INT8), a lb.Quantizer, or None for the"
            " dtype that each parameter has."
        )
    check_plain(param_format, who)
    return dataclasses.replace(param_format, rounding=rounding.nearest)


@contextlib.contextmanager
def said_of(name: str, shape: tuple[int, ...], param_format: ParamFormat, who: str) -> Iterator[None]:
    """What a quantizer says of a shape that it cannot cut, said of the parameter that has it; of the same type."""
    try:
        yield
    except ValueError as error:
        error.args = (
            f"{who}(param_format={_told(param_format)}): the parameter {name!r} of shape {tuple(shape)}:"
            f" {str(error).removesuffix('.')}, or leave it out with mask=.",
        )
        raise


def _told(param_format: ParamFormat) -> str:
    if isinstance(param_format, Quantizer):
        return f"Quantizer of {param_format.format.name}, {param_format.tiling.describe()}"
    return "None" if param_format is None else param_format.name.upper()


def check_plain(quantizer: Quantizer, who: str) -> None:
    plain = not (quantizer.learned or quantizer.rotation or quantizer.zero_point)
    if not plain or quantizer.sparsity is not None or quantizer.debias is not None:
        raise ValueError(
            f"{who}: weights that are stepped on their own grid need a quantizer without learned scale, rotation,"
            f" sparsity, zero points and debias, got {quantizer.explain()}. Put those into the"
            " layer's recipe, and here the format and tiling."
        )


@dataclasses.dataclass(frozen=True, slots=True)
class OnGrid:
    """Weights as grid elements and stored scales: `elements` float32 in the array's shape."""

    elements: Float[Array, "*s"]
    scales: tuple[Array, ...]

    def values(self, quantizer: Quantizer, axis: int) -> Float[Array, "*s"]:
        tiles, _ = quantizer.tiling.split(self.elements, axis)
        return join(tiles * quantizer.scale_format.load(self.scales), self.elements.shape)


def fit_scales(quantizer: Quantizer, x: Float[Array, "*s"], axis: int) -> tuple[Array, ...]:
    tiles, axes = quantizer.tiling.split(x, axis)
    return quantizer.scale_format.store(quantizer.fit(tiles, quantizer.format, axes), quantizer.format)


def nearest_elements(quantizer: Quantizer, x: Float[Array, "*s"], scales: tuple[Array, ...], axis: int) -> Array:
    """The grid elements of values that lie on the grid."""
    tiles, _ = quantizer.tiling.split(x, axis)
    u = tiles * reciprocal(quantizer.scale_format.load(scales))
    return join(rounding.nearest(u, quantizer.format), x.shape)


def step_on_grid(
    quantizer: Quantizer, old: OnGrid, change: Float[Array, "*s"], key: Array | None, axis: int, refit: bool
) -> OnGrid:
    """`old + change`, rounded to the grid: stochastically with a key. `refit` fits the scales to the sum anew.

    Reckoned in grid units, so that elements whose change is 0 stay exactly where they are while the scale stays."""
    before = quantizer.scale_format.load(old.scales)
    scales, after = old.scales, before
    if refit:
        scales = fit_scales(quantizer, old.values(quantizer, axis) + change, axis)
        after = quantizer.scale_format.load(scales)
        same = jnp.abs(after - before) <= KEEP_SCALE * jnp.abs(before)
        if after.shape == scales[0].shape and len(scales) == 1:
            scales = (jnp.where(same, old.scales[0], scales[0]),)
            after = jnp.where(same, before, after)
    inverse = reciprocal(after)
    elements, _ = quantizer.tiling.split(old.elements, axis)
    change, _ = quantizer.tiling.split(change, axis)
    u = elements * jnp.where(after == before, jnp.ones_like(after), before * inverse) + change * inverse
    rounded = rounding.nearest(u, quantizer.format) if key is None else rounding.stochastic(u, quantizer.format, key)
    return OnGrid(join(rounded, old.elements.shape), scales)


def packed_elements(leaf: QTensor, who: str) -> OnGrid:
    check_plain(leaf.quantizer, who)
    return OnGrid(leaf.elements(), leaf.scales)


def packed_anew(leaf: QTensor, target: Float[Array, "*s"], who: str) -> QTensor:
    """`target` to the nearest, by the quantizer of `leaf`; the same static data.

    Raises: ValueError for a learned scale, which no optimizer's master copy holds, and for another layout."""
    quantizer = leaf.quantizer
    if quantizer.learned or leaf.layout != packing.LAYOUT:
        seen = "a learned scale" if quantizer.learned else f"the layout {leaf.layout!r}"
        raise ValueError(
            f"{who}: a packed parameter has {seen}, and is packed anew by scales that are read off it, in the layout"
            f" {packing.LAYOUT!r}. Train it unpacked, by lb.quantize, and convert at the end."
        )
    fresh = dataclasses.replace(quantizer, rounding=rounding.nearest).quantize(target, axis=leaf.axis)
    arrays = dict(words=fresh.words, scales=fresh.scales, marks=fresh.marks, zeros=fresh.zeros)
    return dataclasses.replace(leaf, **arrays)


def repacked(leaf: QTensor, new: OnGrid) -> QTensor:
    """`leaf` with other contents; the same static data, so that it fits into loops and donated buffers."""
    codes = coding.encode(jnp.moveaxis(new.elements, leaf.axis, -1), leaf.quantizer.format)
    return dataclasses.replace(leaf, words=packing.pack(codes, leaf.quantizer.format.bits), scales=new.scales)


def apply_updates(params: Any, updates: Any) -> Any:
    """`optax.apply_updates` for every kind of parameter that this library trains.

    Arrays of 16 bits and more: the sum in float32 (in float64 where one of them is), rounded to the parameter's dtype,
    which is what optax does too. 8-bit floats: likewise, saturating; optax cannot add to them. Packed weights: the
    update is a `PackedUpdate`, which holds the new `QTensor` (from `master_weights` or `stochastic_rounding`);
    `optax.apply_updates`, and so `nnx.Optimizer`, refuses it.
    Raises: ValueError for trees that do not match, for packed parameters whose update is an array, and for packed
    updates that something has changed on their way."""
    trees.check_same_tree(params, updates, "apply_updates", ("parameters", "updates"))
    return jax.tree.map(_applied, params, updates, is_leaf=trees.is_packed)


def _applied(param: Any, update: Any) -> Any:
    if trees.is_packed_update(update) and trees.is_packed(param):
        new = update.weights
        if new.words.dtype != param.words.dtype:
            raise ValueError(
                f"apply_updates: the update of a packed parameter {param!r} has words of {new.words.dtype}; a"
                " transformation after lb.optim.master_weights or lb.optim.stochastic_rounding, such as optax.scale,"
                " has changed them. Put those outermost, with the others inside."
            )
        return new
    if trees.is_packed(param) or trees.is_packed_update(update):
        if not trees.is_packed(param):
            raise ValueError(f"apply_updates: a packed update for an array of {param.dtype}. Were they made together?")
        raise ValueError(
            f"apply_updates: a packed parameter {param!r} needs a packed update, got an array of {update.dtype}."
            " Wrap the optimizer in lb.optim.master_weights or lb.optim.stochastic_rounding, outermost."
        )
    wide = jnp.promote_types(jnp.promote_types(_at_least_float32(param), _at_least_float32(update)), jnp.float32)
    total = param.astype(wide) + update.astype(wide)
    if jnp.dtype(param.dtype).itemsize >= 4:
        return total.astype(param.dtype)
    return on_grid_of(total.astype(jnp.float32), param.dtype).astype(param.dtype)


def _at_least_float32(x: Array) -> Any:
    return jnp.float32 if jnp.dtype(x.dtype).itemsize < 4 else x.dtype


def difference(target: Float[Array, "*s"], param: Array) -> Float[Array, "*s"]:
    """The float32 update that takes `param` to `target` (float32 values of the parameter's dtype).

    `param + update`, summed in float32 and rounded to a 16-bit dtype, is `target` exactly wherever
    |param| <= 2**15 |target| (2**13 for float16) or target = 0; where a step ends that much nearer to zero than it
    began, the sum can be off by 2**-24 |param|."""
    return target - param.astype(jnp.float32)


def unpacked(params: Any, dtype: Any = jnp.float32) -> Any:
    """The parameters with packed weights as arrays: what a loss is differentiated by.

    `grads = jax.grad(loss)(lb.optim.unpacked(params))`."""
    return jax.tree.map(lambda leaf: leaf.dequantize(dtype) if trees.is_packed(leaf) else leaf, params,
                        is_leaf=trees.is_packed)  # fmt: skip


def is_eight_bit(leaf: Any) -> bool:
    return not trees.is_packed(leaf) and format_of(leaf.dtype) is not None
