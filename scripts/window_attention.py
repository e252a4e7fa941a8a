"""Attention in windows with a learned bias, as Triton kernels: a trial."""

import torch
import triton
import triton.language as tl


@triton.jit
def forward_kernel(Q, K, V, B, O, scale, L, N: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    group = tl.program_id(1)
    rows, cols, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, D)
    base = group.to(tl.int64) * L * D
    at_rows, at_cols = base + rows[:, None] * D + d[None, :], base + cols[:, None] * D + d[None, :]
    in_rows, in_cols = rows[:, None] < L, cols[:, None] < L
    q = tl.load(Q + at_rows, mask=in_rows, other=0.0)
    k = tl.load(K + at_cols, mask=in_cols, other=0.0)
    bias = tl.load(
        B + (group % N) * L * L + rows[:, None] * L + cols[None, :], mask=in_rows & (cols[None, :] < L), other=0.0
    )
    s = tl.dot(q, tl.trans(k)) * (scale * 1.4426950408889634) + bias.to(tl.float32) * 1.4426950408889634
    s = tl.where(cols[None, :] < L, s, float("-inf"))
    p = tl.exp2(s - tl.max(s, 1)[:, None])
    v = tl.load(V + at_cols, mask=in_cols, other=0.0)
    o = tl.dot(p.to(v.dtype), v) / tl.sum(p, 1)[:, None]
    tl.store(O + at_rows, o.to(q.dtype), mask=in_rows)


@triton.jit
def backward_q_kernel(
    Q,
    K,
    V,
    B,
    dO,
    dQ,
    dB,
    LSE,
    DELTA,
    scale,
    G,
    L,
    per,
    N: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    n, chunk = tl.program_id(1), tl.program_id(2)
    rows, cols, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, D)
    in_rows, in_cols = rows[:, None] < L, cols[:, None] < L
    in_both = in_rows & (cols[None, :] < L)
    at = rows[:, None] * L + cols[None, :]
    bias = tl.load(B + n * L * L + at, mask=in_both, other=0.0)
    total = tl.zeros((BM, BN), tl.float32)
    for g in range(tl.minimum(per, G - chunk * per)):
        group = (chunk.to(tl.int64) * per + g) * N + n
        at_rows, at_cols = (
            group * L * D + rows[:, None] * D + d[None, :],
            group * L * D + cols[:, None] * D + d[None, :],
        )
        q, do = tl.load(Q + at_rows, mask=in_rows, other=0.0), tl.load(dO + at_rows, mask=in_rows, other=0.0)
        k, v = tl.load(K + at_cols, mask=in_cols, other=0.0), tl.load(V + at_cols, mask=in_cols, other=0.0)
        s = tl.dot(q, tl.trans(k)) * (scale * 1.4426950408889634) + bias.to(tl.float32) * 1.4426950408889634
        s = tl.where(cols[None, :] < L, s, float("-inf"))
        highest = tl.max(s, 1)
        p = tl.exp2(s - highest[:, None])
        norm = tl.sum(p, 1)
        p = p / norm[:, None]
        dp = tl.dot(do, tl.trans(v))
        delta = tl.sum(p * dp, 1)
        ds = p * (dp - delta[:, None])
        total += ds
        dq = tl.dot(ds.to(k.dtype), k) * scale
        tl.store(dQ + at_rows, dq.to(k.dtype), mask=in_rows)
        tl.store(LSE + group * L + rows, highest + tl.log2(norm), mask=rows < L)
        tl.store(DELTA + group * L + rows, delta, mask=rows < L)
    tl.store(dB + (chunk * N + n) * L * L + at, total, mask=in_both)


@triton.jit
def backward_kv_kernel(
    Q, K, V, B, dO, dK, dV, LSE, DELTA, scale, L, N: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    group = tl.program_id(1).to(tl.int64)
    rows, cols, d = tl.arange(0, BN), tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, D)
    at_rows, at_cols = group * L * D + rows[:, None] * D + d[None, :], group * L * D + cols[:, None] * D + d[None, :]
    in_rows, in_cols = rows[:, None] < L, cols[:, None] < L
    in_both = in_rows & (cols[None, :] < L)
    q, do = tl.load(Q + at_rows, mask=in_rows, other=0.0), tl.load(dO + at_rows, mask=in_rows, other=0.0)
    k, v = tl.load(K + at_cols, mask=in_cols, other=0.0), tl.load(V + at_cols, mask=in_cols, other=0.0)
    bias = tl.load(B + (group % N) * L * L + rows[:, None] * L + cols[None, :], mask=in_both, other=0.0)
    lse = tl.load(LSE + group * L + rows, mask=rows < L, other=0.0)
    delta = tl.load(DELTA + group * L + rows, mask=rows < L, other=0.0)
    s = tl.dot(q, tl.trans(k)) * (scale * 1.4426950408889634) + bias.to(tl.float32) * 1.4426950408889634
    p = tl.where(in_both, tl.exp2(s - lse[:, None]), 0.0)
    dv = tl.dot(tl.trans(p.to(do.dtype)), do)
    ds = p * (tl.dot(do, tl.trans(v)) - delta[:, None])
    dk = tl.dot(tl.trans(ds.to(q.dtype)), q) * scale
    tl.store(dV + at_cols, dv.to(k.dtype), mask=in_cols)
    tl.store(dK + at_cols, dk.to(k.dtype), mask=in_cols)


class Attend(torch.autograd.Function):
    @staticmethod
    def forward(context, q, k, v, bias):
        G, N, L, D = q.shape
        q, k, v, bias = q.contiguous(), k.contiguous(), v.contiguous(), bias.contiguous()
        out, BN = torch.empty_like(q), max(16, triton.next_power_of_2(L))
        BM = min(64, BN)
        forward_kernel[(triton.cdiv(L, BM), G * N)](
            q, k, v, bias, out, D**-0.5, L, N, D, BM, BN, num_warps=8 if BN > 64 else 1
        )
        context.save_for_backward(q, k, v, bias)
        return out

    @staticmethod
    def backward(context, upstream):
        q, k, v, bias = context.saved_tensors
        G, N, L, D = q.shape
        upstream = upstream.contiguous()
        BN = max(16, triton.next_power_of_2(L))
        BM = 16
        tiles = triton.cdiv(L, BM)
        chunks = min(G, max(1, -(-1056 // (tiles * N))))
        per = -(-G // chunks)
        chunks = -(-G // per)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(q), torch.empty_like(q)
        partial = torch.empty(chunks, N, L, L, device=q.device)
        lse, delta = torch.empty(2, G, N, L, device=q.device).unbind()
        backward_q_kernel[(tiles, N, chunks)](
            q,
            k,
            v,
            bias,
            upstream,
            dq,
            partial,
            lse,
            delta,
            D**-0.5,
            G,
            L,
            per,
            N,
            D,
            BM,
            BN,
            num_warps=4 if BN > 64 else 1,
            num_stages=2,
        )
        BM = min(32, BN)
        backward_kv_kernel[(triton.cdiv(L, BM), G * N)](
            q, k, v, bias, upstream, dk, dv, lse, delta, D**-0.5, L, N, D, BM, BN, num_warps=8 if BN > 64 else 1
        )
        return dq, dk, dv, partial.sum(0).to(bias.dtype)
