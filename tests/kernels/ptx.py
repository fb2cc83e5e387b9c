"""The inline PTX of the attention kernels, run instruction by instruction for the 128 threads of a program."""

import re

import numpy as np

LOW = np.uint64(0xFFFFFFFF)
THREADS = np.arange(128, dtype=np.uint64)
BYTES = [np.uint64(8 * n) for n in range(4)]


def field(a, first, count):
    return a >> first & (np.uint64(1) << count) - np.uint64(1)


def permuted_bytes(a, b, selector):
    both = a | b << np.uint64(32)
    chosen = [both >> np.uint64(8) * (selector >> at // np.uint64(2) & np.uint64(15)) for at in BYTES]
    return sum((byte & np.uint64(255)) << at for byte, at in zip(chosen, BYTES, strict=True))


OPERATIONS = {
    "mov.u32": lambda a: a,
    "and.b32": np.bitwise_and,
    "or.b32": np.bitwise_or,
    "xor.b32": np.bitwise_xor,
    "add.u32": np.add,
    "sub.u32": np.subtract,
    "shl.b32": np.left_shift,
    "shr.u32": np.right_shift,
    "bfe.u32": field,
    "neg.f32": lambda a: a ^ np.uint64(1 << 31),
    "mul.wide.u32": np.multiply,
    "selp.b32": lambda a, b, where: np.where(where, a, b),
    "prmt.b32": permuted_bytes,
    "shfl.sync.idx.b32": lambda a, lane, clamp, members: a[(THREADS & ~np.uint64(31) | lane).astype(int)],
    "setp.lt.u32": np.less,
    "setp.le.u32": np.less_equal,
    "setp.ge.u32": np.greater_equal,
    "setp.ne.u32": np.not_equal,
    "setp.eq.u32": np.equal,
}


def run(text: str, operands: list[np.ndarray], outputs: int) -> list[np.ndarray]:
    """What `text` leaves in $0 ...: a number for each thread. `operands` are the registers after those."""
    registers = {f"${outputs + n}": x.astype(np.uint64) for n, x in enumerate(operands)} | {"%tid.x": THREADS}
    for guard, name, arguments in re.findall(r"(?:@(\w+) )?([\w.]+) ([^;]+);", text):
        if name.startswith(".reg"):
            continue
        targets, sources = re.match(r"(\{[^}]*\}|[^,]+), (.*)", arguments).groups()
        values = [
            registers[x] if x in registers else np.full(128, int(x, 0) & 0xFFFFFFFF, np.uint64)
            for x in sources.split(", ")
        ]
        if name == "mov.b64":
            low, high = targets.strip("{}").split(", ")
            registers[low], registers[high] = values[0] & LOW, values[0] >> np.uint64(32)
            continue
        value = OPERATIONS[name](*values)
        if name != "mul.wide.u32" and value.dtype != bool:
            value &= LOW
        registers[targets] = np.where(registers[guard], value, registers[targets]) if guard else value
    return [registers[f"${n}"] for n in range(outputs)]


def places(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of the number-th element of each thread, in the layout of a 64 x 64 product on four warps."""
    warp, row, pair = (x.astype(int) for x in (THREADS // 32, THREADS % 32 // 4, THREADS % 4))
    return 16 * warp + 8 * (number // 2 % 2) + row, 8 * (number // 4) + 2 * pair + number % 2


def registers_of(tile: np.ndarray) -> list[np.ndarray]:
    """The registers that hold a tile [64, 64] of 32-bit numbers, or of 16-bit ones in pairs."""
    bits = tile.view(f"u{tile.itemsize}").astype(np.uint64)
    elements = [bits[places(n)] for n in range(32)]
    if tile.itemsize == 4:
        return elements
    return [low | high << np.uint64(16) for low, high in zip(elements[::2], elements[1::2], strict=True)]


def tile_of(registers: list[np.ndarray], dtype: np.dtype) -> np.ndarray:
    """The inverse of `registers_of`."""
    tile = np.empty((64, 64), f"u{np.dtype(dtype).itemsize}")
    for n in range(32):
        tile[places(n)] = registers[n] if tile.itemsize == 4 else registers[n // 2] >> np.uint64(16 * (n % 2)) & 0xFFFF
    return tile.view(dtype)
