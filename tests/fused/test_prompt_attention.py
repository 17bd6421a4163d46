"""The prompt kernel against its twin: softcap, sinks, padding, a window in front, log-sum-exp."""

import mmap

import pytest
import torch
from oracle import relative_rms

from hfkv.kernels.decode_attention import cap
from hfkv.kernels.prompt_attention import lower_right, repeat_heads
from hfkv.kernels.prompt_attention import prompt_attention as twin
from hfkv.kernels.triton.prompt_attention import prompt_attention

EXACT = 2e-6
HALF = 1e-3


def tensors(batch, heads, groups, queries, tokens, dim, value_dim, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, queries, heads * groups, dim, generator=generator).to(dtype).transpose(1, 2)
    k = torch.randn(batch, tokens, heads, dim, generator=generator).to(dtype).transpose(1, 2)
    v = torch.randn(batch, heads, tokens, value_dim, generator=generator).to(dtype)
    return q, k, v, torch.randn(heads * groups, generator=generator)


def total_of(q, k, bias, scaling, softcap, sinks):
    """Log-sum-exp [batch, q_heads, queries] under an additive bias."""
    logits = cap(scaling * q.float() @ repeat_heads(k, q.shape[1] // k.shape[1]).float().transpose(-1, -2), softcap)
    logits = logits + bias
    if sinks is not None:
        logits = torch.cat([logits, sinks[None, :, None, None].expand(*logits.shape[:3], 1)], -1)
    return logits.logsumexp(-1)


@pytest.mark.parametrize("queries, tokens", [(1, 1), (63, 63), (111, 111), (1, 111), (40, 111)])
@pytest.mark.parametrize(
    "groups, dim, value_dim, softcap, sinks",
    [(1, 64, 64, 4.0, True), (3, 80, 80, None, True), (7, 96, 64, 4.0, False), (4, 20, 10, None, False)],
)
def test_causal(queries, tokens, groups, dim, value_dim, softcap, sinks):
    q, k, v, column = tensors(2, 2, groups, queries, tokens, dim, value_dim)
    column = column if sinks else None
    out, lse = prompt_attention(q, k, v, True, 0.2, softcap, column, with_lse=True)
    assert relative_rms(out, twin(q, k, v, None, True, 0.2, softcap, column)) < EXACT
    hidden = torch.zeros(queries, tokens).masked_fill(~lower_right(queries, tokens, q.device), float("-inf"))
    assert relative_rms(lse, total_of(q, k, hidden, 0.2, softcap, column)) < EXACT


@pytest.mark.parametrize("dim, groups, softcap", [(128, 8, None), (256, 2, 50.0), (64, 8, None)])
def test_half_precision(dim, groups, softcap):
    q, k, v, column = tensors(1, 1, groups, 63, 63, dim, dim, torch.float16)
    out, _ = prompt_attention(q, k, v, True, dim**-0.5, softcap, column)
    want = twin(q.float(), k.float(), v.float(), None, True, dim**-0.5, softcap, column)
    assert out.dtype == torch.float16
    assert relative_rms(out, want) < HALF


def test_not_causal():
    q, k, v, column = tensors(2, 2, 2, 40, 111, 64, 64)
    out, _ = prompt_attention(q, k, v, False, 0.2, 4.0, column)
    assert relative_rms(out, twin(q, k, v, None, False, 0.2, 4.0, column)) < EXACT


@pytest.mark.parametrize("queries", [111, 50])
@pytest.mark.parametrize("sinks", [False, True])
def test_padding(queries, sinks):
    """Left, right, in the middle, nothing but pads; pads may hold anything."""
    q, k, v, column = tensors(5, 1, 4, queries, 111, 64, 64)
    column = column if sinks else None
    valid = torch.ones(5, 111, dtype=torch.bool)
    valid[0, :70], valid[1, 100:], valid[2, 63:66], valid[3] = False, False, False, False
    out, lse = prompt_attention(q, k.masked_fill(~valid[:, None, :, None], float("nan")),
                                v.masked_fill(~valid[:, None, :, None], float("nan")), True, 0.2, None, column, valid,
                                with_lse=True)  # fmt: skip
    mask = valid[:, None, None] & lower_right(queries, 111, q.device)
    want = twin(q, k, v, mask, False, 0.2, None, column)
    sees = mask.any(-1)[:, 0]  # [batch, queries]
    for row in range(5):
        if sees[row].any():
            assert relative_rms(out[row][:, sees[row]], want[row][:, sees[row]]) < EXACT
        assert (out[row][:, ~sees[row]] == 0).all()
    total = total_of(q, k, torch.zeros(mask.shape).masked_fill(~mask, float("-inf")), 0.2, None, column)
    assert torch.equal(lse.isinf(), total.isinf())
    assert relative_rms(lse.nan_to_num(neginf=0), total.nan_to_num(neginf=0)) < EXACT


def test_a_window_in_front():
    q, k, v, column = tensors(3, 2, 3, 40, 70, 80, 64)
    generator = torch.Generator().manual_seed(3)
    window_k = torch.randn(3, 2, 96, 80, generator=generator)[:, :, :33]
    window_v = torch.randn(3, 2, 96, 64, generator=generator)[:, :, :33]
    counts = torch.tensor([33, 0, 7])
    held = torch.arange(33) < counts[:, None]
    valid = torch.arange(70) >= torch.tensor([0, 10, 50])[:, None]
    mask = torch.cat([held[:, None].expand(-1, 40, -1), valid[:, None] & lower_right(40, 70, q.device)], 2)[:, None]
    both_k, both_v = torch.cat([window_k, k], 2), torch.cat([window_v, v], 2)
    want = twin(q, both_k, both_v, mask, False, 0.2, 4.0, column)
    window_k, window_v = (x.masked_fill(~held[:, None, :, None], float("nan")) for x in (window_k, window_v))
    out, lse = prompt_attention(
        q, k, v, True, 0.2, 4.0, column, valid, (window_k, window_v, counts), torch.float32, True
    )
    assert relative_rms(out, want) < EXACT
    total = total_of(q, both_k, torch.zeros(mask.shape).masked_fill(~mask, float("-inf")), 0.2, 4.0, column)
    assert relative_rms(lse, total) < EXACT


def test_heads_further_apart_than_32_bits_count():
    """A million tokens of 16 heads, one head behind the other; what a wrapped offset would find is there, and wrong."""
    q, k, v, _ = tensors(1, 1, 3, 2, 4, 16, 16, torch.float16)
    stride, before = 1 << 30, 1 << 31
    reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # no memory but what is touched
    memory = mmap.mmap(-1, 2 * (before + 3 * stride), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserve)
    apart = torch.frombuffer(memory, dtype=torch.float16).as_strided(q.shape, (3 * stride, stride, 16, 1), before)
    apart.copy_(q)
    assert torch.equal(prompt_attention(apart, k, v, True, 0.2)[0], prompt_attention(q, k, v, True, 0.2)[0])
