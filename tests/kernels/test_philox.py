import torch
import triton
import triton.language as tl
from amb.kernels import philox


def test_published_known_answers():
    """Random123's kat_vectors for philox4x32-10: all zeros, all ones, digits of pi."""
    ones, pi = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    cases = [
        (0, (0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (ones << 32 | ones, (ones,) * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (0x299F31D0 << 32 | 0xA4093822, pi, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ]
    for seed, counter, answer in cases:
        assert " ".join(f"{int(word):08x}" for word in philox.philox(seed, *counter)) == answer


@triton.jit
def draw(seed, out, first, stream, kind, N: tl.constexpr):
    column = tl.arange(0, N)
    a, b, c, d = tl.philox(tl.load(seed), column, first, stream, kind)
    for word in tl.static_range(4):
        value = a if word == 0 else (b if word == 1 else (c if word == 2 else d))
        tl.store(out + word * N + column, value.to(tl.int64))


def test_equals_triton(device):
    for seed in (0, 12345, -7, 2**62 + 11):
        out = torch.empty(4, 32, dtype=torch.int64, device=device)
        draw[(1,)](philox.seed_tensor(seed, device), out, 5, 9, 2, 32)
        expected = torch.stack(philox.philox(seed, torch.arange(32), 5, 9, 2))
        torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=0)


def test_seed_may_be_a_tensor():
    for seed in (3, -5, 2**40 + 1):
        as_tensor = philox.philox(torch.tensor([seed]), torch.arange(8), 1, 2, 3)
        assert all(map(torch.equal, as_tensor, philox.philox(seed, torch.arange(8), 1, 2, 3)))


def test_masks_have_the_right_share_and_scale():
    like = torch.empty(0)
    for mask in (philox.dropout_mask, philox.row_mask):
        for probability in (0.1, 0.5, 0.9):
            values = mask(torch.Size((40, 1001)), probability, 11, 2, like)
            kept = values != 0
            torch.testing.assert_close(values[kept], torch.full_like(values[kept], 1 / (1 - probability)))
            spread = (probability * (1 - probability) / values.numel()) ** 0.5
            assert abs(1 - kept.float().mean().item() - probability) < 5 * spread


def test_masks_differ_by_seed_and_stream_only():
    like = torch.empty(0)
    for mask in (philox.dropout_mask, philox.row_mask):
        draw = [mask(torch.Size((4, 64)), 0.5, *key, like) for key in ((1, 2), (1, 2), (2, 2), (1, 3))]
        assert torch.equal(draw[0], draw[1])
        assert not torch.equal(draw[0], draw[2])
        assert not torch.equal(draw[0], draw[3])


def test_integer_counters_join_the_tensors_on_their_device():
    counter = torch.arange(3, device="meta")
    assert philox.philox(7, counter, 1, 2, 3)[0].device.type == "meta"
