"""The rotation and dropout of attention_rotation.py as PTX text, run by a simulator: alone, and within the kernels."""

import warnings

import numpy as np
import pytest
import torch
import triton
from amb.kernels import attention_check, attention_forward, attention_rotation, philox
from triton.runtime import interpreter

from tests.kernels import ptx

ROW, COLUMN = np.arange(64)[:, None], np.arange(64)


@pytest.mark.parametrize(("back", "source"), [(False, COLUMN + ROW), (True, 64 + COLUMN - ROW)], ids=["skew", "unskew"])
def test_rotation(back, source):
    a, b = np.random.default_rng(0).integers(0, 2**16, (2, 64, 64), dtype=np.uint16)
    registers = ptx.run(attention_rotation.rotation_ptx(back), ptx.registers_of(a) + ptx.registers_of(b), 16)
    expected = np.take_along_axis(np.concatenate([a, b], 1), source, 1)
    np.testing.assert_array_equal(ptx.tile_of(registers, np.uint16), expected)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("query", "key", "probability"), [(64, 128, 0.1), (0, 0, 0.7)])
def test_dropout(transposed, query, key, probability):
    weights = np.random.default_rng(0).random((64, 64), dtype=np.float32)
    seed, stream, head = -(2**40) - 3, 5, 2
    mask = philox.attention_mask((1, 3, 192, 192), probability, seed, stream, torch.empty(0))
    kept = mask[0, head, query : query + 64, key : key + 64].flip(0).numpy() > 0
    scalars = [seed, seed >> 32, query // 2 + 31, key // 4, stream, head, round(probability * 2**16) << 16]
    operands = [np.full(128, x & 0xFFFFFFFF, np.uint64) for x in scalars for _ in range(32)]
    text = attention_rotation.dropout_ptx(transposed)
    result = ptx.tile_of(ptx.run(text, ptx.registers_of(weights) + operands, 32), np.float32)
    expected = np.where(kept.T, weights, -weights) if transposed else np.where(kept, weights, 0)
    np.testing.assert_array_equal(result, expected)


@pytest.fixture
def simulated(monkeypatch):
    """Inline PTX in Triton's interpreter, and kernels that use it."""
    if torch.cuda.is_available():
        pytest.skip("the kernels run on the device, not in the interpreter")

    def create_inline_asm(self, text, constraints, values, types, is_pure, pack):
        operands = [np.broadcast_to(x.data, (64, 64)) for x in values]
        registers = [register for x in operands for register in ptx.registers_of(np.ascontiguousarray(x))]
        result = ptx.tile_of(ptx.run(text, registers, constraints.count("=")), operands[0].dtype)
        handle = interpreter.TensorHandle(result, types[0].scalar)
        handle.get_result = lambda index: handle
        return handle

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", create_inline_asm)
    monkeypatch.setattr(attention_check, "ptx_fits", lambda q: q.dtype != torch.float32)
    monkeypatch.setattr(attention_forward, "spellings", {})
    monkeypatch.setattr(attention_check, "spellings", attention_forward.spellings)
    return attention_forward.spellings


def test_the_kernels_in_ptx_agree_with_the_reference(simulated):
    qkv = torch.empty(1, 1, 3, 1, 16, dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert attention_check.usable(qkv, 0.2)
    assert list(simulated.values()) == [True]
    assert attention_check.usable(qkv, 0.2)  # not run again


@pytest.mark.parametrize("broken", ["SKEW", "UNSKEW", "DROP_TRANSPOSED"])
def test_wrong_ptx_is_replaced(simulated, monkeypatch, broken):
    """As another layout would break it: bytes of a pair, bits of a word from another thread."""
    text = getattr(attention_rotation, broken).value
    wrong = text.replace("0x5432", "0x3210").replace("bfe.u32 y, tid, 3, 2", "bfe.u32 y, tid, 2, 2")
    assert wrong != text
    monkeypatch.setattr(attention_rotation, broken, type(attention_rotation.SKEW)(wrong))
    qkv = torch.empty(1, 1, 3, 1, 16, dtype=torch.float16)
    failure = attention_check.disagreement
    monkeypatch.setattr(attention_check, "disagreement", lambda *x: failure(*x) if True in simulated.values() else None)
    with pytest.warns(UserWarning, match=r"float16 heads .* in PTX: relative errors .*; the slower tl.gather"):
        assert attention_check.usable(qkv, 0.2)
    assert list(simulated.values()) == [False]


def test_the_reference_where_no_kernel_is_right(simulated, monkeypatch):
    def refused(*_):
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(attention_check.TritonAttention, "apply", refused)
    qkv = torch.empty(1, 1, 3, 1, 32)
    with pytest.warns(UserWarning, match=r"tl.gather: RuntimeError: .*shared memory.*; the PyTorch reference is used"):
        assert not attention_check.usable(qkv, 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not attention_check.usable(qkv, 0.0)


@pytest.mark.parametrize(
    ("major", "width", "dtype", "fits"),
    [
        (9, 128, torch.bfloat16, True),
        (9, 64, torch.float32, False),
        (8, 64, torch.float16, True),
        (8, 128, torch.float16, False),
        (10, 64, torch.bfloat16, False),
        (12, 32, torch.bfloat16, True),
        (7, 64, torch.float16, False),
    ],
)
def test_ptx_is_tried_where_it_may_be_right(monkeypatch, major, width, dtype, fits):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(attention_forward, "capability", lambda q: (major, 0))
    assert attention_forward.ptx_fits(torch.empty(1, 1, 3, 1, width, dtype=dtype)) is fits
