"""Attention without Triton: the reference, the CPU's form of it, and which of the implementations runs."""

import math

import pytest
import torch
from amb.kernels import attention_cpu, dispatch, philox, relative_attention
from amb.kernels.attention_cpu import relative_attention_reference

from tests.kernels.comparison import assert_close, attend, gradients


def draw(batch, heads, length, width, reach, dtype):
    """q, k, v as views of one projection, as the model makes them, the table in float32 at least, and a gradient."""
    q, k, v = torch.randn(batch, length, 3, heads, width, dtype=dtype).permute(2, 0, 3, 1, 4)
    table = torch.randn(2 * reach - 1, width, dtype=torch.promote_types(dtype, torch.float32))
    return (q, k, v, table), torch.randn(batch, length, heads, width, dtype=dtype).transpose(1, 2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.bfloat16, 1.5e-2)])
def test_reference_is_the_equation(dtype, tolerance):
    """Also in bf16 with a table in fp32, as AMB_KERNELS=reference trains."""
    inputs, _ = draw(2, 2, 13, 8, 20, dtype)
    q, k, v, table = (x.double() for x in inputs)
    place, lengths = torch.arange(13), torch.tensor([13, 4])
    rows = table[place[:, None] - place[None, :] + 19]
    logits = torch.einsum("bhid,bhjd->bhij", q, k)
    logits += torch.einsum("bhid,ijd->bhij", q, rows) + torch.einsum("bhjd,ijd->bhij", k, rows)
    logits = (logits / math.sqrt(8)).masked_fill(place >= lengths[:, None, None, None], -math.inf)
    expected = (logits.softmax(-1) @ v) * (place < lengths[:, None])[:, None, :, None]
    assert_close([relative_attention_reference(*inputs, lengths)], [expected], tolerance)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("heads_at_a_time", [2, 9])
@pytest.mark.parametrize(("length", "lengths"), [(13, [13, 4]), (301, [301, 131])])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_cpu_attention_is_the_reference(dtype, length, lengths, heads_at_a_time, dropout, monkeypatch):
    """With the reference's dropout; one block of rows and several; some heads at a time, or some sequences."""
    monkeypatch.setattr(attention_cpu, "TILES", heads_at_a_time * length**2)
    inputs, grad = draw(2, 3, length, 8, length + 7, dtype)
    lengths = torch.tensor(lengths)
    chance = {"dropout": dropout, "seed": 2**40 + 9, "stream": 2}
    results = gradients(lambda *x: attend(*x, lengths, **chance, implementation="cpu"), inputs, grad)
    keep = philox.dropout_mask((2, 3, length, length), dropout, 2**40 + 9, 2, inputs[0].double())
    reference = gradients(
        lambda *x: relative_attention_reference(*x, lengths, keep), [x.double() for x in inputs], grad
    )
    assert results[0].dtype == dtype
    assert_close(results, reference, {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1.5e-2}[dtype])


def test_attention_of_no_sequence():
    """What a process gets of a last batch smaller than the number of processes."""
    nothing, table = torch.zeros(0, 5, 3, 2, 8), torch.zeros(9, 8, requires_grad=True)
    out = relative_attention(nothing, table, torch.zeros(0, dtype=torch.int32), dropout=0.1)
    assert out.shape == (0, 5, 2, 8)
    out.sum().backward()
    assert not table.grad.any()


def test_implementations_by_name(monkeypatch):
    qkv, table, lengths = torch.zeros(1, 5, 3, 1, 16), torch.zeros(9, 16), torch.tensor([5])
    with pytest.raises(ValueError, match="not one of"):
        relative_attention(qkv, table, lengths, implementation="eager")
    with pytest.raises(ValueError, match="reaches 4"):
        relative_attention(qkv, table[:7], lengths)
    with pytest.raises(ValueError, match="float64 heads of width 16"):
        relative_attention(qkv.double(), table, lengths, implementation="triton")
    assert dispatch.resolve(qkv) == "cpu"
    monkeypatch.setenv("AMB_KERNELS", "reference")
    assert dispatch.resolve(qkv) == "reference"
    assert dispatch.resolve(qkv, "triton") == "triton"
    monkeypatch.setattr(dispatch, "triton", object())
    with pytest.raises(ValueError, match="Triton is not installed"):
        dispatch.resolve(qkv, "triton")
