"""The quantized array, packed: a pytree of storage words and scales that knows how to become an array again."""

import dataclasses
import functools
import hashlib
import math
import operator
from typing import TYPE_CHECKING, Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import core
from jaxtyping import Array, Float, UInt8

from lowbit_jax import coding, packing, rounding
from lowbit_jax.formats.base import FloatFormat, Format, IntFormat
from lowbit_jax.scaling import zero_point
from lowbit_jax.scaling.tiling import join
from lowbit_jax.sparsity import expand

if TYPE_CHECKING:
    from lowbit_jax.quantizer import Quantizer


Kind = TypeVar("Kind")
NO_SEAL = ()


def register_packed(kind: type[Kind]) -> type[Kind]:
    """Makes a kind of packed tensor a pytree, as `jax.tree_util.register_dataclass` does, but for zero points and the
    seal: those that are not there are no child, not even an empty one, so that checkpoints from before there were any
    fit."""
    fields = dataclasses.fields(cast(Any, kind))
    static = tuple(f.name for f in fields if f.metadata.get("static"))
    arrays = tuple(f.name for f in fields if not f.metadata.get("static"))
    keys = {name: jax.tree_util.GetAttrKey(name) for name in arrays}
    leaving_out = lambda *left_out: tuple(name for name in arrays if name not in left_out)
    children_of = {  # by whether there are zero points, and a seal
        (True, True): arrays,
        (True, False): leaving_out("seal"),
        (False, True): leaving_out("zeros"),
        (False, False): leaving_out("zeros", "seal"),
    }
    # A jitted function flattens every weight at every call, and attrgetter takes a third of a comprehension's time.
    getters, data = {k: operator.attrgetter(*n) for k, n in children_of.items()}, operator.attrgetter(*static)

    def flatten(packed: Any) -> tuple[tuple, tuple]:
        return getters[packed.quantizer.zero_point, packed.seal is not NO_SEAL](packed), data(packed)

    def flatten_with_keys(packed: Any) -> tuple[list, tuple]:
        children, told = flatten(packed)
        names = children_of[packed.quantizer.zero_point, packed.seal is not NO_SEAL]
        return [(keys[name], child) for name, child in zip(names, children, strict=True)], told

    def unflatten(told: tuple, children: Any) -> Any:
        children, fixed = tuple(children), dict(zip(static, told, strict=True))
        zeros = fixed["quantizer"].zero_point
        names = children_of[zeros, len(children) == len(children_of[zeros, True])]
        return kind(**dict(zip(names, children, strict=True)), **fixed)

    jax.tree_util.register_pytree_with_keys(kind, flatten_with_keys, unflatten, flatten)
    return kind


@register_packed
@dataclasses.dataclass(frozen=True, eq=False)  # equal and hashed by identity: arrays are neither in one bit
class QTensor:
    """`dequantized = element * scale`, elements packed at `format.bits` bits each along the contraction axis; each
    is a level of the format, or its distance to the zero point of its tile.

    words: uint8 [..., bytes], the array with its contraction axis moved last, each row a little-endian bit stream.
    scales: what the scale format stores, one a tile. marks: the support of a sparse quantizer, one bit a run of
    neighbors, packed likewise; only the kept elements have codes. axis: the contraction axis, counted from the end,
    so that leading axes may be added or sliced off (`vmap`, a `scan` over stacked layers). length: elements along
    that axis. zeros: codes of the zero points, one a tile, where the quantizer has any. seal: an array whose SHAPE, a
    digest, says what the codes mean (`meaning`), so that a checkpoint, which holds arrays alone, is not read as weights
    of another meaning; (), as `Quantizer.quantize` leaves it, is not checked. Values live in the rotated space of
    `quantizer`; `dequantize` answers in the original one."""

    words: UInt8[Array, "*rows bytes"]
    scales: tuple[Array, ...]
    marks: UInt8[Array, "*rows mark_bytes"] | None
    quantizer: "Quantizer" = dataclasses.field(metadata=dict(static=True))
    axis: int = dataclasses.field(metadata=dict(static=True))
    length: int = dataclasses.field(metadata=dict(static=True))
    dtype: Any = dataclasses.field(metadata=dict(static=True))
    layout: str = dataclasses.field(default=packing.LAYOUT, metadata=dict(static=True))
    zeros: UInt8[Array, "*#tiles"] | None = None
    seal: UInt8[Array, "*stack"] | tuple[()] = NO_SEAL

    @property
    def ndim(self) -> int:
        return len(self.words.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array it stands for."""
        rows = list(self.words.shape[:-1])
        rows.insert(self.ndim + self.axis, self.length)
        return tuple(rows)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed words, the stored scales, the marks and the zero points."""
        leaves = jax.tree.leaves((self.words, self.scales, self.marks, self.zeros))
        return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in leaves)

    @property
    def bits_per_element(self) -> float:
        return 8 * self.nbytes / max(self.size, 1)

    @property
    def kept(self) -> int:
        """Codes that a row holds: all elements, or those on the support."""
        support = self.quantizer.sparsity
        return self.length if support is None else self.length // support.group * support.kept

    def meaning(self) -> dict[str, str]:
        """What the arrays stand for, which they do not say themselves; files hold these words, or their digest."""
        slots = self.quantizer.explain(self.length)
        names = ("format", "tiling", "scale_format", "rotation", "sparsity", "zero_point")
        told = {name: slots[name] for name in names if name in slots}
        return {"layout": self.layout, "axis": str(self.axis), **told}

    def sealed(self) -> "QTensor":
        """The same with a seal of its own meaning, which the readers check."""
        return dataclasses.replace(self, seal=jnp.zeros(_seal_shape(self), jnp.uint8))

    def unsealed(self) -> "QTensor":
        """The same without a seal: for files from before there were seals, and not checked."""
        return dataclasses.replace(self, seal=NO_SEAL)

    def check_meaning(self, who: str = "QTensor") -> None:
        """Looks at shapes and dtypes alone, so it works under `jit` and costs nothing there.

        Raises: ValueError when the seal is that of another meaning, and for scales that were cast."""
        if not isinstance(self.seal, tuple):
            _check_seal(self, who)
        view = max((tuple(scale.shape) for scale in self.scales), key=len, default=())
        wanted = _stored_dtypes(self.quantizer.scale_format, self.quantizer.format, view)
        stored = tuple(jnp.dtype(scale.dtype).name for scale in self.scales)
        if stored != wanted:
            raise ValueError(
                f"{who}: its scales are {', '.join(stored)}, and {self.quantizer.scale_format.describe()} stores"
                f" {', '.join(wanted)}; cast, they are other scales. Leave packed weights out of a cast"
                " (jax.tree.map(..., is_leaf=lambda x: isinstance(x, lb.QTensor))), or convert with a quantizer of"
                " that scale_format."
            )

    def elements(self) -> Float[Array, "*s"]:
        """The grid value of each element, float32, in the array's shape, from its zero point; 0 off the support.

        Raises: ValueError for words of another layout than this class reads, and as `check_meaning` does."""
        self.check_layout()
        self.check_meaning(type(self).__name__)
        q, codes = self.quantizer, self._codes()
        if q.sparsity is None:
            rows = coding.decode(codes, q.format)
        else:
            assert self.marks is not None, "elements on a support come with their marks"
            marks = packing.unpack(self.marks, 1, self.length // q.sparsity.run)
            codes, mask = expand(codes, marks, q.sparsity)
            rows = jnp.where(mask, coding.decode(codes, q.format), 0.0)
        return self._from_zero(jnp.moveaxis(rows, -1, self.axis))

    def _from_zero(self, levels: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """Levels of the format, each less the zero point of its tile."""
        if self.zeros is None:
            return levels
        tiles, _ = self.quantizer.tiling.split(levels, self.axis)
        assert isinstance(self.quantizer.format, IntFormat), "only these take zero points"
        return join(tiles - zero_point.loaded(self.zeros, self.quantizer.format), levels.shape)

    def check_layout(self) -> None:
        """Raises: ValueError when the words are of another layout than is read here."""
        if self.layout != packing.LAYOUT:
            raise ValueError(
                f"{type(self).__name__} got words of the layout {self.layout!r}; it reads {packing.LAYOUT!r}. They come"
                " from another version or class: read them there, or quantize the array again."
            )

    def _codes(self) -> UInt8[Array, "*rows kept"]:
        """The code of each kept element, the contraction axis last. A class of another layout has its own."""
        return packing.unpack(self.words, self.quantizer.format.bits, self.kept)

    def validate(self, who: str = "QTensor.validate") -> None:
        """Checks the values of arrays that came from elsewhere, as from a checkpoint; nothing else looks at them.

        `who` starts the message. Raises: ValueError for another layout, words, scales, zero points or marks of the
        wrong shape or dtype, the seal of another meaning, codes and zero points beyond the format, set bits behind the
        last code, scales that are NaN, infinite or negative, and marks that do not keep as many elements as the
        support; TypeError inside `jit`, where values are not known."""
        check_concrete((self.words, self.scales, self.marks, self.zeros), who)
        self.check_layout()
        self.check_meaning(who)
        if type(self)._codes is QTensor._codes:
            _check_words(self, who)
        _check_codes(self._codes(), self.quantizer.format, who)
        _check_scales(self, who)
        if self.quantizer.zero_point:
            _check_zeros(self, who)
        if self.quantizer.sparsity is not None:
            _check_marks(self, who)

    def values(self, dtype: Any = None) -> Float[Array, "*s"]:
        """element * scale in the rotated space: the operand that a product with a rotated partner takes."""
        tiles, _ = self.quantizer.tiling.split(self.elements(), self.axis)
        answer = join(tiles * self.quantizer.scale_format.load(self.scales), self.shape)
        return answer.astype(self.dtype if dtype is None else dtype)

    def dequantize(self, dtype: Any = None) -> Float[Array, "*s"]:
        """The array of the original, un-rotated space, in `dtype` (default: that of the array quantized)."""
        dtype = self.dtype if dtype is None else dtype
        if self.quantizer.rotation is None:
            return self.values(dtype)
        return self.quantizer.rotation.undo(self.values(jnp.float32), self.axis).astype(dtype)

    def _no_array(self, *_: Any, **__: Any) -> Any:
        raise TypeError(
            f"{self!r} is packed, not an array. Use .dequantize() for the array, or"
            " lb.dot_general(x, packed, dimension_numbers, recipe=...) for the product."
        )

    __array__ = __jax_array__ = __matmul__ = __rmatmul__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _no_array
    __add__ = __radd__ = __sub__ = __rsub__ = __neg__ = _no_array
    __array_ufunc__ = None  # or NumPy's operators take it for an object

    def __repr__(self) -> str:
        leaves = jax.tree.leaves((self.words, self.scales, self.marks))
        is_array = lambda leaf: hasattr(leaf, "shape") and hasattr(leaf, "dtype")
        if self.words is None or not all(map(is_array, leaves)):  # mapped to shardings, specs and the like
            return (
                f"{type(self).__name__}({self.quantizer.format.name}, words={self.words!r}, scales={self.scales!r},"
                f" marks={self.marks!r})"
            )
        return (
            f"{type(self).__name__}({jnp.dtype(self.dtype).name}{list(self.shape)}, {self.quantizer.format.name},"
            f" {self.nbytes} bytes, {self.bits_per_element:.2f} bits per element)"
        )


_SEAL_AXES = 16  # of a seal, all of length 1,
_SEAL_TWOS = 5  # but so many of length 2: 4368 digests of 32 bytes. (Orbax keeps no arrays of size 0.)


def _seal_shape(packed: QTensor) -> tuple[int, ...]:
    return _digest((*packed.meaning().items(), ("length", str(packed.length))))


def _check_seal(packed: QTensor, who: str) -> None:
    assert not isinstance(packed.seal, tuple)
    found, own = tuple(packed.seal.shape[-_SEAL_AXES:]), _seal_shape(packed)
    if found != own:
        meaning = ", ".join(f"{name} {value}" for name, value in packed.meaning().items())
        raise ValueError(
            f"{who}: its seal is not that of what it is read as: {meaning}, length {packed.length}. The"
            " arrays come from a weight of another recipe: restore the checkpoint into what lb.convert makes of the"
            " recipe it was saved with. After a dataclasses.replace of your own, call .sealed()."
        )


@functools.cache
def _digest(words: tuple[tuple[str, str], ...]) -> tuple[int, ...]:
    found = hashlib.sha256(repr(words).encode()).digest()
    twos = list(dict.fromkeys(byte % _SEAL_AXES for byte in found))[:_SEAL_TWOS]
    return tuple(2 if axis in twos else 1 for axis in range(_SEAL_AXES))


@functools.cache
def _stored_dtypes(scale_format: Any, fmt: Format, view: tuple[int, ...]) -> tuple[str, ...]:
    """What the scale format stores of float32 scales."""
    store = lambda scale: scale_format.store(scale, fmt)
    return tuple(s.dtype.name for s in jax.eval_shape(store, jax.ShapeDtypeStruct(view, jnp.float32)))


def check_concrete(arrays: Any, who: str) -> None:
    """Raises TypeError inside `jit`, where values are not known."""
    for leaf in jax.tree.leaves(arrays):
        if isinstance(leaf, core.Tracer) or not hasattr(leaf, "__array__"):
            raise TypeError(f"{who}: it looks at values, and got a {type(leaf).__name__}. Call it outside jit.")


def _check_words(packed: QTensor, who: str) -> None:
    bits, words = packed.quantizer.format.bits, packed.words
    size = packing.packed_size(packed.kept, bits)
    if words.dtype != jnp.uint8 or words.ndim == 0 or words.shape[-1] != size:
        raise ValueError(
            f"{who}: words are {words.dtype}{list(words.shape)}; {packed.kept} codes of {bits} bits a row are uint8"
            f" [..., {size}]. The file or its template belongs to another format or shape."
        )
    if packed.kept * bits % 8:
        spare = np.asarray(words)[..., -1] >> (packed.kept * bits % 8)
        if (index := _first(spare != 0)) is not None:
            raise ValueError(f"{who}: row {index} has bits set behind its last code, which are zero in"
                             f" {packing.LAYOUT!r}. The words are damaged.")  # fmt: skip


def _check_codes(codes: Array, fmt: Format, who: str) -> None:
    if isinstance(fmt, FloatFormat):
        _check_levels(coding.decode(codes, fmt), fmt, who)
    elif (index := _first(np.asarray(codes) >= len(fmt.levels))) is not None:
        raise ValueError(
            f"{who}: code {int(codes[index])} at {index} of the packed rows is none of the {len(fmt.levels)} codes of"
            f" {fmt.name}. The words are damaged, or of another format."
        )


def _check_levels(elements: Array, fmt: Format, who: str) -> None:
    values = np.asarray(elements)
    legal = (values >= fmt.min_finite) & (values <= fmt.max_finite)  # NaN is neither
    if (index := _first(~legal & ((values != 0) | fmt.has_zero))) is not None:  # 0 stands off a sparse support
        raise ValueError(
            f"{who}: the element at {index} is {values[index]}, not a finite value of {fmt.name}. The words are"
            " damaged, or of another format."
        )


def _check_scales(packed: QTensor, who: str) -> None:
    stored = tuple((tuple(s.shape), jnp.dtype(s.dtype).name) for s in packed.scales)
    whole, load = None, packed.quantizer.scale_format.load
    for stack in range(packed.ndim + packed.axis + 1):
        expected = tuple((tuple(s.shape), jnp.dtype(s.dtype).name) for s in _scales_like(packed, stack))
        whole = whole or expected
        if stored == expected:
            break
        load = jax.vmap(load)
    else:
        raise ValueError(f"{who}: scales are {_listed(stored)}; an array of shape {packed.shape} in tiles of"
                         f" {packed.quantizer.tiling.describe()} has {_listed(whole or ())}.")  # fmt: skip
    scales = np.asarray(load(packed.scales), np.float32)
    if (index := _first(~(np.isfinite(scales) & (scales >= 0)))) is not None:
        raise ValueError(
            f"{who}: the scale at {index} is {scales[index]}; scales are finite and not negative. The file is damaged,"
            " or the array held a NaN or infinity when it was quantized."
        )


def _check_zeros(packed: QTensor, who: str) -> None:
    zeros, wanted = packed.zeros, tuple(packed.scales[0].shape)
    told = "there are none" if zeros is None else f"{zeros.dtype}{list(zeros.shape)}"
    if zeros is None or zeros.dtype != jnp.uint8 or tuple(zeros.shape) != wanted:
        raise ValueError(f"{who}: zero points are uint8{list(wanted)}, one for each scale; got {told}. The file or its"
                         " template belongs to another format or shape.")  # fmt: skip
    levels = len(packed.quantizer.format.levels)
    if (index := _first(np.asarray(zeros) >= levels)) is not None:
        raise ValueError(
            f"{who}: the zero point at {index} has the code {int(zeros[index])}, and {packed.quantizer.format.name} has"
            f" {levels} codes. The file is damaged."
        )


def _scales_like(packed: QTensor, stack: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes of the scales when the first `stack` axes are those of arrays quantized one by one."""
    q = dataclasses.replace(packed.quantizer, rounding=rounding.nearest)  # needs no key
    quantize = lambda x: q.quantize(x, axis=packed.axis, scale=jnp.ones(()) if q.learned else None).scales
    for _ in range(stack):
        quantize = jax.vmap(quantize)
    return jax.eval_shape(quantize, jax.ShapeDtypeStruct(packed.shape, jnp.float32))


def _check_marks(packed: QTensor, who: str) -> None:
    support, marks = packed.quantizer.sparsity, packed.marks
    assert support is not None
    if marks is None:
        raise ValueError(f"{who}: it has no marks, and {support.describe()} needs them. The file is incomplete.")
    runs = packed.length // support.run
    size = packing.packed_size(runs, 1)
    if marks.dtype != jnp.uint8 or marks.ndim == 0 or marks.shape[-1] != size:
        raise ValueError(
            f"{who}: marks are {marks.dtype}{list(marks.shape)}; {runs} marks a row are uint8 [..., {size}]."
        )
    count = packed.length // support.group
    groups = np.asarray(packing.unpack(marks, 1, runs)).reshape(*marks.shape[:-1], count, support.group // support.run)
    kept = groups.sum(-1) * support.run
    if (index := _first(kept != support.kept)) is not None:
        raise ValueError(
            f"{who}: group {index} keeps {kept[index]} of its {support.group} elements; {support.describe()} keeps"
            f" {support.kept}. The marks are damaged."
        )


def _first(bad: np.ndarray) -> tuple[int, ...] | None:
    """Index of the first True."""
    return tuple(int(i) for i in np.argwhere(bad)[0]) if np.any(bad) else None


def _listed(leaves: tuple) -> str:
    return ", ".join(f"{dtype}{list(shape)}" for shape, dtype in leaves)
