"""The storage layout "planes/1": codes of 1 to 8 bits so that a shift and a mask give a whole slice of the contraction.

For codes u[n, k] in [0, 2^bits), output channel n, contraction index k. The bits of a code are cut into fields of 1, 2,
4 or 8 bits, most significant first (`FIELDS`); each field is an array of its own. With words of B = 8 or 16 bits and a
field of f bits, a block of 32 B/f contraction indices is one row of 32 words:

    bits [f p, f p + f) of word[kb, n, c]  =  the field of k = kb (32 B/f) + 32 p + c,   p in [0, B/f), c in [0, 32)

so plane p of a block is the slice k = 32 p ... 32 p + 31 of it. Words are signed integers by dtype and bits by meaning.
K is padded with code 0 to whole blocks of the widest field's partner, N to a multiple of 32.
"""

import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Int, UInt8

from pallas_kernels.checks import check_bits, fail

LAYOUT = "planes/1"
COLUMNS = 32  # words of a block's row, and contraction indices of a plane
ROWS = 32  # output channels are padded to a multiple of this
FIELDS: dict[int, tuple[int, ...]] = {
    1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,),
}  # fmt: skip
_WORD = {8: jnp.int8, 16: jnp.int16}
_UNSIGNED = {8: jnp.uint8, 16: jnp.uint16}


def block_length(field: int, word_bits: int) -> int:
    """Contraction indices in a block of one field."""
    return COLUMNS * word_bits // field


def step_length(bits: int, word_bits: int) -> int:
    """Contraction indices after which every field of the width is at a block's start."""
    return max(block_length(field, word_bits) for field in FIELDS[bits])


def padded_k(k: int, bits: int, word_bits: int) -> int:
    """The contraction length as stored: the next multiple of `step_length`."""
    return -(-k // step_length(bits, word_bits)) * step_length(bits, word_bits)


def padded_n(n: int) -> int:
    """The output channels as stored: the next multiple of 32."""
    return -(-n // ROWS) * ROWS


def word_shapes(n: int, k: int, bits: int, word_bits: int = 16) -> tuple[tuple[int, int, int], ...]:
    """Shapes of the word arrays of an [N, K] matrix, most significant field first."""
    length, rows = padded_k(k, bits, word_bits), padded_n(n)
    return tuple((length // block_length(field, word_bits), rows, COLUMNS) for field in FIELDS[bits])


def pack(codes: UInt8[Array, "n k"], bits: int, word_bits: int = 16) -> tuple[Int[Array, "blocks rows 32"], ...]:
    """The word arrays of codes, one a field. Under `jit` a code of 2^bits or more loses its upper bits unseen.

    Raises: ValueError for widths that are not 1 to 8, words that are not 8 or 16 bits, arrays that are not matrices
    or have no rows, or codes of 2^bits or more, where their values are known (not traced); TypeError for codes that are
    not uint8."""
    check_bits("planes.pack", bits)
    _check_word_bits("planes.pack", word_bits)
    if codes.dtype != jnp.uint8:
        raise TypeError(f"planes.pack got codes of {codes.dtype}; codes are uint8. Encode first.")
    if codes.ndim != 2:
        raise ValueError(
            f"planes.pack got codes of shape {codes.shape}; it packs a matrix [N, K]. Use vmap for stacks."
        )
    if codes.shape[0] == 0:
        fail("planes.pack", f"got codes of shape {codes.shape}", "A matrix has at least one output channel; skip it")
    _check_range(codes, bits)
    n, k = codes.shape
    codes = jnp.pad(codes, ((0, padded_n(n) - n), (0, padded_k(k, bits, word_bits) - k)))
    words, above = [], bits
    for field in FIELDS[bits]:
        above -= field
        part = ((codes >> above) & ((1 << field) - 1)).astype(_UNSIGNED[word_bits])
        planes = part.reshape(codes.shape[0], -1, word_bits // field, COLUMNS)
        word = jnp.zeros((codes.shape[0], planes.shape[1], COLUMNS), part.dtype)
        for p in range(word_bits // field):
            word |= planes[:, :, p] << jnp.asarray(field * p, part.dtype)
        words.append(lax.bitcast_convert_type(jnp.transpose(word, (1, 0, 2)), _WORD[word_bits]))
    return tuple(words)


def unpack(words: tuple[Int[Array, "blocks rows 32"], ...], bits: int, n: int, k: int) -> UInt8[Array, "n k"]:
    """The codes of `pack`.

    Raises: ValueError for words whose shapes or dtypes are not those of an [n, k] matrix of this width."""
    word_bits = check_words("planes.unpack", words, bits, n, k)
    codes, above = jnp.zeros((padded_n(n), padded_k(k, bits, word_bits)), jnp.uint8), bits
    for word, field in zip(words, FIELDS[bits], strict=True):
        above -= field
        rows = jnp.transpose(lax.bitcast_convert_type(word, _UNSIGNED[word_bits]), (1, 0, 2))
        moves = jnp.arange(0, word_bits, field, dtype=rows.dtype)[None, None, :, None]  # one loop, not one a plane
        part = (rows[:, :, None, :] >> moves) & jnp.asarray((1 << field) - 1, rows.dtype)
        codes |= part.reshape(codes.shape).astype(jnp.uint8) << above
    return codes[:n, :k]


def check_words(who: str, words: tuple[Int[Array, "blocks rows 32"], ...], bits: int, n: int, k: int) -> int:
    """The word size of `words`, when they are those of an [n, k] matrix of codes of `bits` bits.

    Raises: ValueError when they are not; TypeError for words that are not int8 or int16."""
    check_bits(who, bits)
    if not isinstance(words, tuple | list) or len(words) != len(FIELDS[bits]):
        count = len(words) if isinstance(words, tuple | list) else f"a {type(words).__name__}"
        fail(who, f"got {count} word arrays; {bits} bits are stored as {len(FIELDS[bits])}, fields {FIELDS[bits]}",
             "Pack with planes.pack(codes, bits)")  # fmt: skip
    sizes = {8 * jnp.dtype(word.dtype).itemsize for word in words}
    if len(sizes) != 1 or not sizes <= {8, 16} or not all(jnp.issubdtype(w.dtype, jnp.signedinteger) for w in words):
        raise TypeError(f"{who} got words of {[str(w.dtype) for w in words]}; they are all int8 or all int16.")
    word_bits = sizes.pop()
    expected = word_shapes(n, k, bits, word_bits)
    if (got := tuple(tuple(word.shape) for word in words)) != expected:
        fail(who, f"got words of shapes {got}; {bits}-bit codes of a [{n}, {k}] matrix in {word_bits}-bit words have"
             f" {expected} (layout {LAYOUT})", "Check N, K and bits against what was packed")  # fmt: skip
    return word_bits


def check_layout(who: str, layout: str) -> None:
    """Raises: ValueError for words of another layout, or another version of this one."""
    if layout != LAYOUT:
        fail(who, f"got words of layout {layout!r}; these kernels read {LAYOUT!r}",
             "Unpack with the code that wrote them and pack again")  # fmt: skip


def _check_range(codes: UInt8[Array, "n k"], bits: int) -> None:
    if bits == 8 or codes.size == 0 or isinstance(codes, Tracer):
        return
    if (largest := int(jnp.max(codes))) >= 1 << bits:
        fail("planes.pack", f"got a code {largest}; codes of {bits} bits are 0 to {(1 << bits) - 1}",
             "Encode with the width that is packed, or pack with more bits")  # fmt: skip


def _check_word_bits(who: str, word_bits: int) -> None:
    if word_bits not in _WORD:
        fail(who, f"got word_bits={word_bits}", "Words have 16 bits (for 16-bit activations) or 8 (for 8-bit ones)")
