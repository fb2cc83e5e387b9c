"""MIDI files written byte by byte, so that the tests do not depend on the library under test to make them."""

import io
import struct
from types import SimpleNamespace

import pytest


def varint(number: int) -> bytes:
    out = [number & 0x7F]
    while number := number >> 7:
        out.append(number & 0x7F | 0x80)
    return bytes(reversed(out))


def track(*events: tuple[int, bytes]) -> bytes:
    """A track chunk from (absolute tick, message bytes); events need not be in order, ties keep theirs."""
    body, now = b"", 0
    for tick, message in sorted(events, key=lambda event: event[0]):
        body += varint(tick - now) + message
        now = tick
    body += b"\x00\xff\x2f\x00"
    return b"MTrk" + struct.pack(">L", len(body)) + body


def smf(*tracks: bytes, division: int = 480, kind: int = 1, count: int | None = None) -> bytes:
    count = len(tracks) if count is None else count
    return b"MThd" + struct.pack(">LHHH", 6, kind, count & 0xFFFF, division & 0xFFFF) + b"".join(tracks)


def on(pitch: int, velocity: int = 64, channel: int = 0) -> bytes:
    return bytes((0x90 | channel, pitch, velocity))


def off(pitch: int, channel: int = 0) -> bytes:
    return bytes((0x80 | channel, pitch, 0))


def program(number: int, channel: int = 0) -> bytes:
    return bytes((0xC0 | channel, number))


def tempo(microseconds: int) -> bytes:
    return b"\xff\x51\x03" + microseconds.to_bytes(3, "big")


def signature(n: int, log2_m: int) -> bytes:
    return bytes((0xFF, 0x58, 4, n, log2_m, 24, 8))


def name(text: str) -> bytes:
    return b"\xff\x03" + varint(len(text)) + text.encode("latin1")


def note(start: int, end: int, pitch: int = 60, velocity: int = 64, channel: int = 0) -> list[tuple[int, bytes]]:
    return [(start, on(pitch, velocity, channel)), (end, off(pitch, channel))]


@pytest.fixture(scope="session")
def midi():
    """The functions above, and `file(bytes)`, a file object."""
    functions = (varint, track, smf, on, off, program, tempo, signature, name, note)
    return SimpleNamespace(**{function.__name__: function for function in functions}, file=io.BytesIO)


@pytest.fixture(scope="session")
def again():
    """The words of a file that decode made, by way of the bytes that it would have on disk."""

    def again(encoding, words):
        file = io.BytesIO()
        encoding.decode(words).save(file=file)
        file.seek(0)
        return encoding.encode(file)

    return again
