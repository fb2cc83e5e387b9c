import pytest
import torch
from amb.kernels import adversarial_sample, philox, top_k
from amb.kernels.sampling import cap_count, draw_count, unpack_bits

VALUES = (256, 128, 129, 256, 128, 32, 254, 49)


def inputs(batch, length, device="cpu"):
    words = torch.stack([torch.randint(0, n, (batch, length), device=device) for n in VALUES], -1)
    lengths = torch.randint(0, length + 1, (batch,), device=device)
    lengths[0] = length
    values = torch.tensor(VALUES, device=device)
    return words, lengths, values + 1, values


def mask_book(batch, length, device="cpu"):
    """About a quarter of the notes frozen."""
    bits = [torch.randint(0, 256, (batch, (length + 7) // 8), dtype=torch.uint8, device=device) for _ in range(2)]
    return bits[0] & bits[1]


def both(*arguments, **options):
    kernel, reference = (
        adversarial_sample(*arguments, **options, implementation=name) for name in ("triton", "reference")
    )
    for ours, theirs in zip(kernel, reference, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    return kernel


@pytest.mark.parametrize(("seed", "length"), [(0, 1), (-9, 130), (2**40 + 3, 64), (2**63 - 1, 9)])
def test_kernel_equals_reference_bit_for_bit(seed, length, device):
    words, *others = inputs(3, length, device)
    scores, frozen = torch.rand(3, length, device=device), mask_book(3, length, device)
    both(words, *others, scores=scores, frozen=frozen, seed=seed, stream=2)
    both(words.short(), *others, frozen=frozen, seed=torch.tensor([seed], device=device), rate=(0.15, 0.15))
    both(words.int(), *others, scores=scores, seed=seed, rate=(0.9, 1.0), cap=1.0, masked=0.3, replaced=0.6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_ties_and_signs(dtype, device):
    """Few different scores, negative ones and both zeros among them: ties go to the earlier note."""
    arguments = inputs(4, 70, device)
    scores = torch.tensor([-1.5, -0.0, 0.0, 0.25], device=device)[torch.randint(0, 4, (4, 70), device=device)].to(dtype)
    sample = both(*arguments, scores=scores, seed=3, rate=(0.5, 0.6), cap=0.4)
    assert sample.selected.any()


def test_nothing_to_select(device):
    words, lengths, mask_word, values = inputs(3, 20, device)
    everything = torch.full((3, 3), 255, dtype=torch.uint8, device=device)
    for notes, options in ((lengths, {"frozen": everything}), (lengths, {"cap": 0.0}), (lengths * 0, {})):
        sample = both(words, notes, mask_word, values, seed=5, **options)
        assert not sample.selected.any()
        assert torch.equal(sample.words, words)


def test_cap_is_exact():
    cases = ((0.15, 20, 3), (0.15, 1000, 150), (0.29, 100, 29), (0.15, 1024, 153), (0.0, 7, 0), (1.0, 7, 7))
    for cap, length, count in cases:
        assert cap_count(cap, length) == count


def test_top_k_against_a_loop():
    scores = torch.randint(0, 5, (6, 23)).float()
    eligible = torch.rand(6, 23) < 0.6
    k = torch.randint(0, 30, (6, 1))
    marked = top_k(scores, eligible, k)
    for b in range(6):
        best = sorted(eligible[b].nonzero()[:, 0].tolist(), key=lambda i: (-scores[b, i].item(), i))[: int(k[b])]
        assert marked[b].nonzero()[:, 0].tolist() == sorted(best)


def test_reference_against_a_loop():
    """Note by note, from Philox words drawn one at a time."""
    words, lengths, mask_word, values = inputs(3, 40)
    scores, frozen = torch.rand(3, 40), mask_book(3, 40)
    sample = adversarial_sample(words, lengths, mask_word, values, scores=scores, frozen=frozen, seed=11, stream=6)
    for b in range(3):
        free = [i for i in range(int(lengths[b])) if not (int(frozen[b, i // 8]) >> (i % 8)) & 1]
        rho = 0.1 + 0.2 * int(philox.philox(11, 0, b, 6, 1)[0]) / 2**32
        k = min(int(rho * len(free)), 6)
        chosen = sorted(free, key=lambda i: (-scores[b, i].item(), i))[:k]
        for i in range(40):
            action = int(philox.philox(11, i, b, 6, 0)[0]) / 2**32
            expected = words[b, i].tolist()
            if i in chosen and action < 0.8:
                expected = mask_word.tolist()
            elif i in chosen and action < 0.9:
                draws = [int(d) for group in range(2) for d in philox.philox(11, i, b, 6, 2 + group)]
                expected = [d * n >> 32 for d, n in zip(draws, VALUES, strict=True)]
            assert sample.words[b, i].tolist() == expected
            assert bool(sample.selected[b, i]) == (i in chosen)
            assert bool(sample.changed[b, i]) == (i in chosen and action < 0.9)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_part_of_a_batch_gets_what_it_would_get_in_the_whole(implementation, device):
    words, lengths, mask_word, values = inputs(5, 70, device)
    scores, frozen = torch.rand(5, 70, device=device), mask_book(5, 70, device)

    def rows(start, end, **options):
        part = slice(start, end)
        ranked = {"scores": scores[part], "frozen": frozen[part]} if options.pop("ranked") else {}
        return adversarial_sample(
            words[part], lengths[part], mask_word, values, **ranked, **options, implementation=implementation,
            seed=17, stream=3, first_row=start,
        )  # fmt: skip

    for options in ({"ranked": True}, {"ranked": False, "rate": (0.4, 0.4), "cap": 1.0}):
        whole = rows(0, 5, **options)
        assert whole.changed.any()
        for start, end in ((0, 2), (2, 5), (5, 5)):
            for part, of_whole in zip(rows(start, end, **options), whole, strict=True):
                assert torch.equal(part, of_whole[start:end])


def test_rho_is_uniform_and_selection_stays_inside():
    lengths = torch.randint(1, 129, (300,))
    words = torch.zeros(300, 128, 8, dtype=torch.int64)
    frozen = mask_book(300, 128)
    values = torch.tensor(VALUES)
    sample = adversarial_sample(words, lengths, values + 1, values, frozen=frozen, seed=8, cap=1.0)
    eligible = (torch.arange(128) < lengths[:, None]) & ~unpack_bits(frozen, 128)
    assert not (sample.selected & ~eligible).any()
    count = sample.selected.sum(1)
    assert (count <= 0.3 * eligible.sum(1)).all()
    assert (count >= (0.1 * eligible.sum(1)).floor()).all()
    draws = philox.philox(8, 0, torch.arange(300)[:, None], 0, 1)[0]
    rho = draw_count(draws, torch.tensor(2**31 - 1), (0.1, 0.3)) / (2**31 - 1)
    assert abs(rho.mean().item() - 0.2) < 5 * 0.2 / (12 * 300) ** 0.5
    assert abs(rho.std().item() - 0.2 / 12**0.5) < 0.008
