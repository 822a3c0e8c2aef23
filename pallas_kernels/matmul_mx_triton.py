"""The kernel of `matmul_mx` in raw Triton. Importing this needs the package triton."""

import triton
import triton.language as tl


@triton.jit
def product(
    x_ptr, w_ptr, w_scale_ptr, x_scale_ptr, out_ptr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, SPLIT: tl.constexpr,
    X: tl.constexpr, W: tl.constexpr, X_PACK: tl.constexpr, W_PACK: tl.constexpr,
    X_SCALED: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """One tile of out[part] = x W^T over its part of K; the weights' tile is the left operand of the product.

    X, W: Triton's names of the elements; X_PACK, W_PACK: of them in a byte. ACROSS: the weight's scales are [K/32, N].
    """
    n = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    m = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(2)
    steps: tl.constexpr = (K + STEP - 1) // STEP
    turns: tl.constexpr = (steps + SPLIT - 1) // SPLIT
    blocks: tl.constexpr = K // 32
    in_n, in_m = n < N, m < M
    total = tl.zeros((COLUMNS, ROWS), tl.float32)
    for i in range(part * turns, min(part * turns + turns, steps)):
        kw = i * (STEP // W_PACK) + tl.arange(0, STEP // W_PACK)
        kx = i * (STEP // X_PACK) + tl.arange(0, STEP // X_PACK)
        j = i * (STEP // 32) + tl.arange(0, STEP // 32)
        w = tl.load(
            w_ptr + n[:, None] * (K // W_PACK) + kw[None, :],
            mask=in_n[:, None] & (kw < K // W_PACK)[None, :], other=0.0,
        )  # fmt: skip
        if ACROSS:
            w_scale_at = w_scale_ptr + j[None, :] * N + n[:, None]
        else:
            w_scale_at = w_scale_ptr + n[:, None] * blocks + j[None, :]
        w_scale = tl.load(w_scale_at, mask=in_n[:, None] & (j < blocks)[None, :], other=0)
        x = tl.load(
            x_ptr + m[None, :] * (K // X_PACK) + kx[:, None],
            mask=in_m[None, :] & (kx < K // X_PACK)[:, None], other=0.0,
        )  # fmt: skip
        if X_SCALED:
            x_scale = tl.load(
                x_scale_ptr + m[:, None] * blocks + j[None, :],
                mask=in_m[:, None] & (j < blocks)[None, :], other=0,
            )  # fmt: skip
            total = tl.dot_scaled(w, w_scale, W, x, x_scale, X, total)
        else:
            total = tl.dot_scaled(w, w_scale, W, x, None, X, total)
    at = part.to(tl.int64) * (M * N) + m[None, :] * N + n[:, None]
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=in_m[None, :] & in_n[:, None])
