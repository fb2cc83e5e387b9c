import pytest
import torch
from amb.kernels import compound_embedding, philox
from amb.kernels.embedding import compound_embedding_reference

from tests.kernels.comparison import assert_close, gradients

SIZES = (150, 5, 64, 9, 70)


def inputs(batch, length, width, sizes, dtype, device="cpu"):
    words = torch.stack([torch.randint(0, size, (batch, length), device=device) for size in sizes], -1)
    words[..., -1] = 3  # one row that every note uses
    table = torch.randn(sum(sizes), width, device=device).to(dtype)
    offsets = torch.tensor([sum(sizes[:f]) for f in range(len(sizes))], device=device)
    vectors = [torch.randn(width, device=device) for _ in range(3)]
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
    leaves, grad = (table, *vectors), torch.randn(shape, device=device).to(dtype)
    chance = {"dropout": dropout, "seed": 2**35 + 1, "stream": 4, "implementation": "triton"}
    keep = philox.row_mask(grad.shape, dropout, 2**35 + 1, 4, grad.double()) if dropout else None

    def reference(table, *vectors):
        return compound_embedding_reference(words, table, offsets, *vectors, 1e-12, keep)

    results = gradients(
        lambda table, *vectors: compound_embedding(words, table, offsets, *vectors, **chance), leaves, grad
    )
    assert results[0].dtype == dtype
    exact = gradients(reference, [x.double() for x in leaves], grad)
    assert_close(results, exact, {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype])


def test_reference_against_a_loop():
    words, table, offsets, bias, weight, norm_bias = inputs(2, 3, 8, (4, 5), torch.float64)
    out = compound_embedding_reference(words, table, offsets, bias, weight, norm_bias, 1e-12)
    for b in range(2):
        for i in range(3):
            z = bias.double()
            for f in range(2):
                z = z + table[int(offsets[f] + words[b, i, f])]
            n = (z - z.mean()) / z.var(unbiased=False).sqrt()
            torch.testing.assert_close(out[b, i], n * weight + norm_bias, rtol=1e-6, atol=1e-6)


def test_unused_rows_get_no_gradient_and_same_bits_each_time(device):
    words, table, offsets, *vectors = inputs(2, 20, 16, SIZES, torch.float32, device)

    def embed(table, *vectors):
        return compound_embedding(words, table, offsets, *vectors, dropout=0.2, seed=9, implementation="triton")

    grad = torch.randn(2, 20, 16, device=device)
    first, again = (gradients(embed, (table, *vectors), grad) for _ in range(2))
    assert all(map(torch.equal, first, again))
    unused = torch.ones(len(table), dtype=torch.bool, device=device)
    unused[(words + offsets).flatten()] = False
    assert unused.any()
    assert not first[1][unused].any()


def test_words_of_any_integer_type(device):
    words, *rest = inputs(2, 5, 16, (4, 9), torch.float32, device)
    first, second = (
        compound_embedding(words.to(dtype), *rest, implementation="triton") for dtype in (torch.int16, torch.int64)
    )
    assert torch.equal(first, second)
