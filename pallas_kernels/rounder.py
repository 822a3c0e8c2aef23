"""From rotated numbers to codes: the scale of a row, the rounding, and the fields of packed words."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int8, Int32

_ROUND = 12582912  # 1.5 * 2^23: adding it rounds a float32 to the nearest integer, ties to even, in the lowest bits
_ROUND_BITS = 0x4B400000


def scale_of(squares: Float[Array, "r"], k: int, alpha: float) -> Float[Array, "r"]:
    """alpha times the root mean square of rows of k, from the sums of squares; NaN where that is not finite."""
    scale = jnp.sqrt(squares * np.float32(1 / k)) * np.float32(alpha)
    return jnp.where(jnp.isfinite(scale), scale, jnp.nan)


def inverse(scale: Float[Array, "r"]) -> Float[Array, "r"]:
    """1 / scale, and 0 of 0."""
    return jnp.where(scale == 0, 0.0, 1.0 / jnp.where(scale == 0, 1.0, scale))


@dataclasses.dataclass(frozen=True, slots=True)
class Rounder:
    """From h to codes in two multiply-adds: u = clip((h/s + offset) / n, 0, 1), then +-n u is added to a number so
    large that it is rounded to an integer, which stands in the low byte of the sum.

    Even integers win ties, and the sign is such that those are the even values of round(h/s + half): on a mid-rise grid
    the byte is 127 - code, on an integer one code + 128."""

    bits: int
    midrise: bool
    assembly: bool

    @property
    def top(self) -> int:
        return (1 << self.bits) - 1

    def __call__(self, h: Float[Array, "p c"], gain: Float[Array, "*p"]) -> Int32[Array, "p c"]:
        """Bits whose low byte is the code's; `gain` is 1/(s n). NaN gives a code of the width too."""
        zero = 1 << (self.bits - 1)
        offset = np.float32((zero - 0.5 * self.midrise) / self.top)
        times = np.float32(-self.top if self.midrise else self.top)
        plus = np.float32(_ROUND + 127 + zero if self.midrise else _ROUND + 128 - zero)
        if not self.assembly:
            u = h * gain + offset
            u = jnp.minimum(jnp.where(u > 0, u, 0), 1)
            return lax.bitcast_convert_type(u * times + plus, jnp.int32)
        constant = lambda value: f"0f{value.view(np.uint32):08X}"
        text = f"fma.rn.sat.f32 u, $1, $2, {constant(offset)}; fma.rn.f32 $0, u, {constant(times)}, {constant(plus)};"
        return inline(f"{{ .reg .f32 u; {text} }}", "=r,f,f", jnp.int32, h, jnp.broadcast_to(gain, h.shape))

    def int8(self, found: Int32[Array, "p c"]) -> Int8[Array, "p c"]:
        """The codes of bits."""
        turn = 0x7F if self.midrise else 0x80
        if not self.assembly:
            return (found ^ turn).astype(jnp.int8)
        text = "prmt.b32 t, $1, $2, 0x40; prmt.b32 u, $3, $4, 0x40; prmt.b32 t, t, u, 0x5410; "
        text += f"xor.b32 $0, t, {turn * 0x01010101:#x};"
        return inline(f"{{ .reg .b32 t, u; {text} }}", "=r,r,r,r,r", jnp.int8, found, pack=4)

    def sums(self, total: Int32[Array, "r"], count: int, beyond: int) -> Int32[Array, "r"]:
        """The sum of codes of rows from that of `count` bits, `beyond` of which are of zeros behind the row's end."""
        if self.midrise:
            return _wrapped(count * (_ROUND_BITS + 127) + beyond) - total
        return total - _wrapped(count * (_ROUND_BITS + 128))

    def turned(self, found: Int32[Array, "*s"]) -> Int32[Array, "*s"]:
        """Integers whose lowest `bits` are the codes + 2^(bits-1)."""
        return found ^ self._turn

    @property
    def _turn(self) -> int:
        """Bits of 127 - code or code + 128 that are other than those of code + 2^(bits-1), mod 2^bits."""
        zero = 1 << (self.bits - 1)
        return (zero - 1 if self.midrise else zero) if self.bits < 8 else (255 if self.midrise else 0)

    def field(self, found: list[Int32[Array, "p 32"]], first: int, field: int, above: int) -> Int32[Array, "p 32"]:
        """Planes `first` and on of a word of the fields [above, above + field) of the codes + 2^(bits-1)."""
        ones, turn = (1 << field) - 1, self._turn
        word = jnp.zeros_like(found[0])
        for p, each in enumerate(found, first):
            part, by = each & (ones << above), field * p - above
            word = word | (part << by if by >= 0 else lax.shift_right_logical(part, jnp.int32(-by)))
        return word ^ sum(((turn >> above) & ones) << field * p for p in range(first, first + len(found)))


def inline(text: str, constraints: str, dtype: Any, *args: Array, pack: int = 1) -> Array:
    """What a piece of PTX makes of each element of the arguments, or of `pack` neighbors."""
    shape = [jax.ShapeDtypeStruct(args[0].shape, dtype)]
    return plgpu.elementwise_inline_asm(
        text, args=list(args), constraints=constraints, pack=pack, result_shape_dtypes=shape
    )[0]


def _wrapped(n: int) -> np.int32:
    return np.uint32(n % 2**32).astype(np.int32)
