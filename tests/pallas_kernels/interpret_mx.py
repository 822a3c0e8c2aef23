"""Run by test_matmul_mx.py in a process of its own: the raw Triton kernel by Triton's interpreter, against float64.

Prints one line a case, `name error`, the largest difference over the largest sum of magnitudes."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when the kernel is decorated

import ml_dtypes
import numpy as np

from pallas_kernels.matmul_mx_triton import product

ELEMENTS = {"e2m1": ml_dtypes.float4_e2m1fn, "e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
DTYPES = {
    np.dtype(kind): np.dtype(kind).name
    for kind in (np.uint8, np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
}


class HostTensor:
    """A NumPy array with the methods of a tensor that the interpreter asks for; memory stays where it is."""

    def __init__(self, array):
        self.array, self.dtype, self.device = array, DTYPES[array.dtype], "cpu"

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    def cpu(self):
        return self

    def copy_(self, other):
        return self

    def new_empty(self, size, device):
        return HostTensor(self.array)

    def set_(self, storage, offset, size, stride):
        self.array = storage.array

    def storage_offset(self):
        return 0

    def size(self):
        return self.array.shape

    def stride(self):
        return tuple(s // self.array.itemsize for s in self.array.strides)

    def element_size(self):
        return self.array.itemsize


def operand(random, rows, k, element):
    """(words as the kernel takes them, scale codes, float64 values)."""
    if element == "bf16":
        x = random.standard_normal((rows, k)).astype(ml_dtypes.bfloat16)
        return x, None, x.astype(np.float64)
    spread = np.exp2(random.integers(-3, 4, (rows, k // 32)))  # neighboring blocks differ
    x = random.standard_normal((rows, k)) * np.repeat(spread, 32, axis=1)
    scales = (127 + np.log2(spread)).astype(np.uint8)
    codes = (x / np.repeat(spread, 32, axis=1)).astype(ELEMENTS[element])
    values = codes.astype(np.float64) * np.repeat(spread, 32, axis=1)
    if element != "e2m1":
        return codes, scales, values
    raw = codes.view(np.uint8)
    return np.ascontiguousarray(raw[:, ::2] | raw[:, 1::2] << 4), scales, values


def run(x_element, w_element, m, n, k, split, across):
    random = np.random.default_rng(m * n + k)
    x, x_scales, x_values = operand(random, m, k, x_element)
    w, scales, w_values = operand(random, n, k, w_element)
    out = np.full((split, m, n), np.nan, np.float32)
    stored = np.ascontiguousarray(scales.T) if across else scales
    rows, columns, step = 16, 64, 128
    product[(-(-n // columns), -(-m // rows), split)](
        HostTensor(x), HostTensor(w), HostTensor(stored), HostTensor(stored if x_scales is None else x_scales),
        HostTensor(out), M=m, N=n, K=k, ROWS=rows, COLUMNS=columns, STEP=step, SPLIT=split, X=x_element, W=w_element,
        X_PACK=2 if x_element == "e2m1" else 1, W_PACK=2 if w_element == "e2m1" else 1, X_SCALED=x_scales is not None,
        ACROSS=across,
    )  # fmt: skip
    error = np.abs(out.astype(np.float64).sum(0) - x_values @ w_values.T).max()
    return error / (np.abs(x_values) @ np.abs(w_values).T).max()


for case in (
    ("bf16", "e2m1", 3, 70, 288, 1, False),
    ("bf16", "e2m1", 17, 64, 512, 3, True),
    ("bf16", "e4m3", 3, 70, 288, 2, True),
    ("bf16", "e5m2", 3, 70, 288, 1, False),
    ("e2m1", "e2m1", 17, 70, 288, 2, False),
    ("e4m3", "e2m1", 3, 64, 256, 1, True),
    ("e4m3", "e4m3", 17, 70, 288, 1, False),
):
    print(*case, run(*case), flush=True)
