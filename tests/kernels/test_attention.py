import math

import pytest
import torch
from amb.kernels import attention_backward, attention_forward, philox
from amb.kernels.attention_cpu import relative_attention_reference

from tests.kernels.comparison import assert_close, attend, gradients

SHAPES = [  # batch, heads, length, width, reach, lengths
    (1, 1, 1, 32, 1, [1]),
    (1, 2, 7, 64, 7, [7]),
    (2, 1, 65, 32, 80, [65, 1]),
    (1, 1, 70, 128, 90, [69]),
    (2, 1, 130, 16, 130, [37, 129]),
]


def draw(batch, heads, length, width, reach, lengths, dtype, device):
    """q, k, v as views of one projection, as the model makes them; table; lengths; the output's gradient."""
    generator = torch.Generator().manual_seed(length)
    q, k, v = torch.randn(batch, length, 3, heads, width, generator=generator).permute(2, 0, 3, 1, 4).to(dtype)
    table = torch.randn(2 * reach - 1, width, generator=generator).to(dtype)
    grad = torch.randn(batch, length, heads, width, generator=generator).transpose(1, 2).to(dtype)
    return *(x.to(device) for x in (q, k, v, table)), torch.tensor(lengths, device=device), grad.to(device)


def checked(inputs, lengths, grad, tolerance, keep=None, **options):
    """The kernels' output and gradients, which must be those of the reference in float64."""
    results = gradients(lambda *x: attend(*x, lengths, **options, implementation="triton"), inputs, grad)
    exact = gradients(lambda *x: relative_attention_reference(*x, lengths, keep), [x.double() for x in inputs], grad)
    # a single valid note has softmax 1: its dq, dk and dR are 0, and what is left is rounding
    assert_close(results, exact, tolerance, least=1.0)
    return results


@pytest.fixture
def few_programs(monkeypatch):
    """float32 in the large tiles of 16 bits: the interpreter's time goes by operations, not by elements."""
    if torch.cuda.is_available():
        return

    shipped = attention_forward.settings

    def settings(qkv, dropout):
        chances, options = shipped(qkv, dropout)
        return chances, options | {"N": 64}

    for module in (attention_forward, attention_backward):
        monkeypatch.setattr(module, "settings", settings)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("few_programs")
def test_float32_output_and_gradients(shape, device):
    *inputs, lengths, grad = draw(*shape, torch.float32, device)
    results = checked(inputs, lengths, grad, 1e-5)
    past = torch.arange(shape[2], device=device) >= lengths[:, None]
    for result in results[:4]:
        assert not result.mT.masked_select(past[:, None, None]).any()


@pytest.mark.parametrize(
    ("dtype", "length", "tolerance"),
    [(torch.float32, 20, 1e-5), (torch.float16, 70, 2e-3), (torch.bfloat16, 70, 1.5e-2)],
)
def test_shipped_tiles(dtype, length, tolerance, device):
    *inputs, lengths, grad = draw(2, 1, length, 64, 100, [length, 9], dtype, device)
    assert checked(inputs, lengths, grad, tolerance)[0].dtype == dtype


@pytest.mark.usefixtures("few_programs")
def test_dropout_is_the_documented_philox_in_both_directions(device, monkeypatch):
    monkeypatch.setattr(attention_backward, "SCRATCH", 3 * 2**16)  # a chunk of three heads, then one
    *inputs, lengths, grad = draw(2, 2, 67, 32, 67, [67, 30], torch.float32, device)
    seed = torch.tensor([2**40 + 11], device=device)
    keep = philox.attention_mask((2, 2, 67, 67), 0.3, seed, 5, inputs[0].double())
    checked(inputs, lengths, grad, 1e-5, keep, dropout=0.3, seed=seed, stream=5)


def test_dropout_rate_seed_and_stream():
    def keep(seed, stream):
        return philox.attention_mask((4, 4, 128, 128), 0.1, seed, stream, torch.empty(0)) > 0

    first = keep(3, 0)
    tolerance = 5 / math.sqrt(first.numel())
    assert abs(1 - first.double().mean() - 0.1) < 0.3 * tolerance
    neighbours = (first[1:], first[:-1]), (first[..., 8:], first[..., :-8]), (first[..., 8:, :], first[..., :-8, :])
    for one, other in ((first, keep(4, 0)), (first, keep(3, 1)), (first[..., 1:], first[..., :-1]), *neighbours):
        assert abs((~one & ~other).double().mean() - 0.01) < 0.1 * tolerance


@pytest.mark.usefixtures("few_programs")
def test_a_seed_gives_the_same_bits(device):
    *inputs, lengths, grad = draw(1, 2, 40, 32, 64, [33], torch.float32, device)

    def run(seed):
        options = {"dropout": 0.2, "seed": seed, "implementation": "triton"}
        return gradients(lambda *x: attend(*x, lengths, **options), inputs, grad)

    first, again, other = run(1), run(1), run(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


@pytest.fixture
def poisoned():
    """torch fills whatever it allocates with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("few_programs", "poisoned")
def test_nothing_is_read_before_it_is_written(device):
    assert torch.empty(1, device=device).isnan()
    *inputs, lengths, grad = draw(2, 1, 70, 16, 140, [33, 1], torch.float32, device)
    options = {"dropout": 0.1, "seed": 7, "implementation": "triton"}
    assert all(x.isfinite().all() for x in gradients(lambda *x: attend(*x, lengths, **options), inputs, grad))
