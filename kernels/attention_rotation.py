"""The skew of a tile without leaving its registers, and dropout where the logits lie: docs/kernels.md draws both.

A tile is N x N, its logit (m, n) wants row y + m + n of the reversed distance table, and a product with N table rows
puts that number into column m + n of row m. The skew brings it to column n; the unskew takes a gradient back.

Both have two spellings: `tl.gather`, and inline PTX for 16-bit tiles of 64 x 64 in the layout in which tensor cores
leave a product, on four warps. Thread 32 w + 4 r + q holds rows 16 w + 8 h + r (h = 0, 1) and of each octet t of eight
columns the pair 8 t + 2 q, one 32-bit word: a shift of row m by m columns is a choice among the thread's words for the
octets, a shuffle among the four threads of a row for the pairs, and a byte permutation for an odd column. Triton
chooses this layout, and the text is right in no other: tests read it from the compiled kernels.
"""

from .dispatch import tl, triton
from .philox import ATTENTION_ROUNDS

ROUNDS = tl.constexpr(ATTENTION_ROUNDS)


def rotation_ptx(back: bool) -> str:
    """Of [A | B], 64 x 128 in $16 to $47, row m shifted left by m columns, or by 64 - m: $0 to $15.

    Word 2 t + h of a tile is octet t of row 16 w + 8 h + r. 64 - m is 63 - m, all bits of m turned over, and one more.
    """
    bit = "eq" if back else "ne"
    lines = [
        ".reg .pred w0, w1, wraps, next_wraps, odd;",
        ".reg .b32 tid, q, row, shift, pairs, x, source, next_source, halves;",
        "mov.u32 tid, %tid.x; and.b32 q, tid, 3; and.b32 row, tid, 28;",
        f"and.b32 x, tid, 32; setp.{bit}.u32 w0, x, 0; and.b32 x, tid, 64; setp.{bit}.u32 w1, x, 0;",
        # what is left within an octet is 0 to 8 columns: whole pairs, and perhaps half of one
        "shr.u32 shift, row, 2;" + " sub.u32 shift, 8, shift;" * back,
        "shr.u32 pairs, shift, 1; and.b32 x, shift, 1; setp.ne.u32 odd, x, 0; selp.b32 halves, 0x5432, 0x3210, odd;",
        # whose pair this thread reads, and whose pair after that
        "add.u32 x, q, pairs; and.b32 source, x, 3; or.b32 source, source, row;",
        "add.u32 x, x, 1; and.b32 next_source, x, 3; or.b32 next_source, next_source, row;",
        # whether the thread that reads this one's pair wants it from the next octet
        "setp.lt.u32 wraps, q, pairs; setp.le.u32 next_wraps, q, pairs;",
    ]
    for h in (0, 1):
        octets = [f"${16 + 2 * t + h}" for t in range(16)][1 - h if back else h :]
        lines.append(f".reg .b32 y{h}_<13>, z{h}_<9>, u{h}_<8>, v{h}_<8>;")
        lines += [f"selp.b32 y{h}_{t}, {octets[t + 2]}, {octets[t]}, w0;" for t in range(13)]
        lines += [f"selp.b32 z{h}_{t}, y{h}_{t + 4}, y{h}_{t}, w1;" for t in range(9)]
        for t in range(8):
            pair, following = f"u{h}_{t}", f"v{h}_{t}"
            lines += [
                f"selp.b32 {pair}, z{h}_{t + 1}, z{h}_{t}, wraps; shfl.sync.idx.b32 {pair}, {pair}, source, 31, -1;",
                f"selp.b32 {following}, z{h}_{t + 1}, z{h}_{t}, next_wraps;",
                f"shfl.sync.idx.b32 {following}, {following}, next_source, 31, -1;",
                f"prmt.b32 ${2 * t + h}, {pair}, {following}, halves;",
            ]
    return "\n".join(("{", *lines, "}"))


def dropout_ptx(transposed: bool) -> str:
    """Dropout of the 32 weights in $32 to $63 (fp32; number 4 t + 2 h + e is column 8 t + 2 q + e): $0 to $31.

    A tile [queries, keys]: dropped weights become 0. Transposed, [keys, queries]: they become negative.
    A call's eight draws belong to one thread of [queries, keys]. Transposed, a thread makes four calls for the keys of
    its warp, packs which of the 32 draws keep into a word, and reads its weights' bits from two threads' words.
    """
    low, high, row, column, stream, head, threshold = (f"${64 + 32 * n}" for n in range(7))
    lines = [
        ".reg .b32 tid, x, y, c0, c1, c2, c3, k0, k1, lo0, hi0, lo1, hi1, kept, even, odd;",
        ".reg .b64 p0, p1; .reg .pred keep; mov.u32 tid, %tid.x; mov.u32 kept, 0;",
    ]
    for call in range(4):
        if transposed:  # rows 16 call + r and 8 more; columns of the warp
            lines.append(f"bfe.u32 y, tid, 2, 3; add.u32 y, y, {8 * call}; shr.u32 x, tid, 5; shl.b32 x, x, 2;")
        else:  # rows of the warp; columns 16 call + 2 q
            lines.append(f"shr.u32 y, tid, 2; mov.u32 x, {4 * call};")
        lines += [
            f"and.b32 c0, tid, 3; add.u32 c0, c0, x; add.u32 c0, c0, {column}; sub.u32 c1, {row}, y;",
            f"mov.u32 c2, {stream}; mov.u32 c3, {head}; mov.u32 k0, {low}; mov.u32 k1, {high};",
        ]
        lines += [
            "mul.wide.u32 p0, c0, 0xD2511F53; mul.wide.u32 p1, c2, 0xCD9E8D57;",
            "mov.b64 {lo0, hi0}, p0; mov.b64 {lo1, hi1}, p1;",
            "xor.b32 c0, hi1, c1; xor.b32 c0, c0, k0; xor.b32 c2, hi0, c3; xor.b32 c2, c2, k1;",
            "mov.u32 c1, lo1; mov.u32 c3, lo0; add.u32 k0, k0, 0x9E3779B9; add.u32 k1, k1, 0xBB67AE85;",
        ] * ATTENTION_ROUNDS
        for word in range(4):
            h, octet = 1 - word // 2, word % 2  # a tile's queries are in reverse: query // 8 % 2 = 1 - h
            for e, draw in enumerate((f"shl.b32 x, c{word}, 16;", f"mov.u32 x, c{word};")):
                draw += f" setp.ge.u32 keep, x, {threshold};"
                at = 8 * call + 4 * octet + 2 * h + e
                packed = f"@keep or.b32 kept, kept, {1 << (8 * call + 4 * h + 2 * octet + e)};"
                lines.append(f"{draw} {packed if transposed else f'selp.b32 ${at}, ${32 + at}, 0, keep;'}")
    if transposed:  # weight 4 t + 2 h + e is bit 4 t + 2 h + r % 2 of the word of thread 4 (2 q + e) + r / 2
        lines += [
            "and.b32 x, tid, 3; shl.b32 x, x, 3; bfe.u32 y, tid, 3, 2; add.u32 x, x, y; add.u32 y, x, 4;",
            "shfl.sync.idx.b32 even, kept, x, 31, -1; shfl.sync.idx.b32 odd, kept, y, 31, -1;",
            "bfe.u32 x, tid, 2, 1; shr.u32 even, even, x; shr.u32 odd, odd, x;",
        ]
        for at in range(32):
            bit = f"and.b32 x, {'odd' if at % 2 else 'even'}, {1 << (at & ~1)}; setp.ne.u32 keep, x, 0;"
            lines.append(f"{bit} neg.f32 x, ${32 + at}; selp.b32 ${at}, ${32 + at}, x, keep;")
    return "\n".join(("{", *lines, "}"))


SKEW, UNSKEW = tl.constexpr(rotation_ptx(back=False)), tl.constexpr(rotation_ptx(back=True))
ROTATED = tl.constexpr(",".join(["=&r"] * 16 + ["r"] * 32))
DROP, DROP_TRANSPOSED = tl.constexpr(dropout_ptx(transposed=False)), tl.constexpr(dropout_ptx(transposed=True))
DROPPED = tl.constexpr(",".join(["=&r"] * 32 + ["r"] * 32 * 8))


@triton.jit
def rotate(a, b, BACK: tl.constexpr, PTX: tl.constexpr):
    """The skew, out[m, n] = [a | b][m, m + n]; with BACK the unskew, out[m, n] = [a | b][m, N + n - m]."""
    if PTX:
        TEXT: tl.constexpr = UNSKEW if BACK else SKEW
        return tl.inline_asm_elementwise(TEXT, ROTATED, [a, b], dtype=a.dtype, is_pure=True, pack=32)
    else:
        N: tl.constexpr = a.shape[1]
        m, n = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
        at = N + n - m if BACK else m + n
        return tl.where(at < N, tl.gather(a, at % N, 1), tl.gather(b, at % N, 1))


@triton.jit
def drop(weights, seed, query, key, stream, head, threshold, TRANSPOSED: tl.constexpr, PTX: tl.constexpr):
    """Dropout of one tile from (query, key) on, its queries in reverse: [queries, keys], dropped weights 0, or
    transposed, [keys, queries], dropped weights negative. The rule of the draws is `philox.attention_mask`.
    """
    if PTX:
        TEXT: tl.constexpr = DROP_TRANSPOSED if TRANSPOSED else DROP
        low, high = seed.to(tl.int32), (seed >> 32).to(tl.int32)
        arguments = [weights, low, high, query // 2 + 31, key // 4, stream, head, threshold << 16]
        return tl.inline_asm_elementwise(TEXT, DROPPED, arguments, dtype=tl.float32, is_pure=True, pack=32)
    else:
        N: tl.constexpr = weights.shape[0]
        queries = query + N - 1 - tl.arange(0, N)
        keys = key + tl.arange(0, N)
        queries = queries[None, :] if TRANSPOSED else queries[:, None]
        keys = keys[:, None] if TRANSPOSED else keys[None, :]
        column, row = keys // 16 * 4 + keys % 8 // 2, queries // 16 * 8 + queries % 8
        a, b, c, d = tl.philox(seed, column, row, stream, head, ROUNDS)
        even, odd = tl.where(queries // 8 % 2 == 0, a, c), tl.where(queries // 8 % 2 == 0, b, d)
        word = tl.where(keys // 8 % 2 == 0, even, odd)
        draws = tl.where(keys % 2 == 0, word & 0xFFFF, word >> 16)
        return tl.where(draws >= threshold, weights, -weights if TRANSPOSED else 0.0)
