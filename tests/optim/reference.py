"""Published algorithms once more, in NumPy and float64, from their papers and from what the peers say of them."""

import numpy as np


def dynamic_map(signed: bool, bits: int) -> np.ndarray:
    """The 2**bits values of the dynamic data type: for each decimal exponent the means of neighboring points of a
    linear grid on [0.1, 1], finer for larger exponents; zero and one beside them (Dettmers et al. 2022)."""
    exponents = bits - 1
    values = [0.0, 1.0]
    for i in range(exponents):
        intervals = 2**i if signed else 2 ** (i + 1)
        grid = [0.1 + 0.9 * k / intervals for k in range(intervals + 1)]
        means = [(a + b) / 2 * 10.0 ** (i - exponents + 1) for a, b in zip(grid, grid[1:], strict=False)]
        values += means + ([-m for m in means] if signed else [])
    return np.array(sorted(values))


def quantize_blocks(
    x: np.ndarray, table: np.ndarray, block: int, positive_stays: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """(codes, scales) of the flattened array: each block divided by its largest magnitude, nearest table entry.

    positive_stays, where this library leaves the peers: what is above 0 takes at least the smallest positive entry, so
    that no second moment vanishes beside a large one while its first moment does not."""
    flat = x.reshape(-1).astype(np.float32)
    blocks = np.pad(flat, (0, -flat.size % block)).reshape(-1, block)
    scales = np.abs(blocks).max(1)
    normal = blocks.astype(np.float64) / np.where(scales == 0, 1, scales)[:, None]
    middles = (table[1:] + table[:-1]) / 2
    codes = np.searchsorted(middles, normal, side="right")
    if positive_stays:
        codes = np.where(blocks > 0, np.maximum(codes, np.flatnonzero(table > 0)[0]), codes)
    return codes.reshape(-1)[: flat.size].reshape(x.shape), scales


def dequantize_blocks(codes: np.ndarray, scales: np.ndarray, table: np.ndarray, block: int) -> np.ndarray:
    flat = table[codes.reshape(-1)]
    blocks = np.pad(flat, (0, -flat.size % block)).reshape(-1, block) * np.where(scales == 0, 1, scales)[:, None]
    return blocks.reshape(-1)[: codes.size].reshape(codes.shape)


class Adam8bit:
    """8-bit AdamW of one array as bitsandbytes and torchao run it: moments decoded, updated, used at full precision for
    the step, and encoded again in blocks of 256; but for second moments, none of which becomes 0 that was not."""

    def __init__(self, shape, lr, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, block=256):
        self.lr, self.b1, self.b2, self.eps, self.decay, self.block = lr, b1, b2, eps, weight_decay, block
        self.signed, self.unsigned = dynamic_map(True, 8), dynamic_map(False, 8)
        self.m = quantize_blocks(np.zeros(shape), self.signed, block)
        self.v = quantize_blocks(np.zeros(shape), self.unsigned, block)
        self.t = 0

    def step(self, p: np.ndarray, g: np.ndarray) -> np.ndarray:
        self.t += 1
        m = self.b1 * dequantize_blocks(*self.m, self.signed, self.block) + (1 - self.b1) * g
        v = self.b2 * dequantize_blocks(*self.v, self.unsigned, self.block) + (1 - self.b2) * g * g
        self.m = quantize_blocks(m, self.signed, self.block)
        self.v = quantize_blocks(v, self.unsigned, self.block, positive_stays=True)
        denominator = np.sqrt(v / (1 - self.b2**self.t)) + self.eps
        return p - self.lr * (m / (1 - self.b1**self.t) / denominator + self.decay * p)


def rank_one(v: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(codes 0..15, row maxima, column maxima): v over the smaller maximum, rounded to k/16, k = 1..16."""
    rows, columns = v.max(1), v.max(0)
    scale = np.minimum(rows[:, None], columns[None, :])
    return np.clip(np.rint(v / scale * 16), 1, 16).astype(int) - 1, rows, columns


def companded(x: np.ndarray, block: int, largest: float, smallest: float) -> tuple[np.ndarray, np.ndarray]:
    """COAT's expansion in its own form: (values to be rounded to the float format, exponent k of each block).

    |x| is divided by sqrt(min max) of its block, raised to k, and scaled so that the largest lands on the format's."""
    blocks = x.reshape(-1, block)
    magnitude = np.abs(blocks)
    low = np.where(magnitude > 0, magnitude, np.inf).min(1, keepdims=True)
    high = magnitude.max(1, keepdims=True)
    k = np.floor(16 * np.log(largest / smallest) / np.log(high / low)) / 16
    k = np.clip(k, 1 / 16, 15)
    bent = np.sign(blocks) * (magnitude / np.sqrt(low * high)) ** k
    return (bent / np.abs(bent).max(1, keepdims=True) * largest).reshape(x.shape), k[:, 0]
