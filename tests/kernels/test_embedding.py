import pytest
import torch
from amb.kernels import compound_embedding, philox
from amb.kernels.embedding import compound_embedding_reference

from tests.kernels.comparison import relative_error

SIZES = (150, 5, 64, 9, 70)


def inputs(batch, length, width, sizes, dtype, device="cpu"):
    words = torch.stack([torch.randint(0, size, (batch, length), device=device) for size in sizes], -1)
    words[..., -1] = 3  # one row that every note uses
    table = torch.randn(sum(sizes), width, device=device).to(dtype).requires_grad_()
    offsets = torch.tensor([sum(sizes[:f]) for f in range(len(sizes))], device=device)
    vectors = [torch.randn(width, device=device, requires_grad=True) for _ in range(3)]
    return words, table, offsets, *vectors


@pytest.mark.parametrize(
    ("shape", "sizes", "dtype", "dropout"),
    [
        ((2, 17, 24), SIZES, torch.float32, 0.0),
        ((1, 1, 48), SIZES, torch.float32, 0.0),
        ((3, 70, 100), SIZES, torch.float32, 0.3),
        ((2, 40, 256), (33, 5), torch.float32, 0.1),
        ((2, 9, 16), (4,), torch.float32, 0.1),
        ((2, 33, 72), SIZES, torch.bfloat16, 0.1),
        ((2, 9, 40), SIZES, torch.float16, 0.0),
    ],
)
def test_kernel_against_float64(shape, sizes, dtype, dropout, device):
    words, table, offsets, *vectors = inputs(*shape, sizes, dtype, device)
    grad = torch.randn(shape, device=device).to(dtype)
    out = compound_embedding(
        words, table, offsets, *vectors, dropout=dropout, seed=2**35 + 1, stream=4, implementation="triton"
    )
    out.backward(grad)

    exact = [t.detach().double().requires_grad_() for t in (table, *vectors)]
    keep = philox.row_mask(out.shape, dropout, 2**35 + 1, 4, exact[0]) if dropout else None
    reference = compound_embedding_reference(words, exact[0], offsets, *exact[1:], 1e-12, keep)
    reference.backward(grad.double())

    tolerance = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    assert out.dtype == dtype
    assert relative_error(out.detach(), reference.detach()) < tolerance
    for argument, truth in zip((table, *vectors), exact, strict=True):
        assert argument.grad.dtype == argument.dtype
        assert relative_error(argument.grad, truth.grad) < tolerance


def test_reference_against_a_loop():
    words, table, offsets, bias, weight, norm_bias = (t.detach() for t in inputs(2, 3, 8, (4, 5), torch.float64))
    out = compound_embedding_reference(words, table, offsets, bias, weight, norm_bias, 1e-12)
    for b in range(2):
        for i in range(3):
            z = bias.double()
            for f in range(2):
                z = z + table[int(offsets[f] + words[b, i, f])]
            n = (z - z.mean()) / z.var(unbiased=False).sqrt()
            torch.testing.assert_close(out[b, i], n * weight + norm_bias, rtol=1e-6, atol=1e-6)


def test_unused_rows_get_no_gradient_and_same_bits_each_time(device):
    arguments = inputs(2, 20, 16, SIZES, torch.float32, device)
    words, table, offsets = arguments[:3]
    runs = []
    for _ in range(2):
        out = compound_embedding(*arguments, dropout=0.2, seed=9, implementation="triton")
        runs.append((out, *torch.autograd.grad(out.square().sum(), (table, *arguments[3:]))))
    assert all(map(torch.equal, *runs))
    unused = torch.ones(len(table), dtype=torch.bool, device=device)
    unused[(words + offsets).flatten()] = False
    assert unused.any()
    assert runs[0][1][unused].abs().max() == 0


def test_words_of_any_integer_type(device):
    words, *rest = inputs(2, 5, 16, (4, 9), torch.float32, device)
    first, second = (
        compound_embedding(words.to(dtype), *rest, implementation="triton") for dtype in (torch.int16, torch.int64)
    )
    assert torch.equal(first, second)
