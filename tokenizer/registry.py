"""The two encodings, put together, by name."""

from . import cp, octuple, octuple_decode
from .encoding import Encoding

ENCODINGS = {
    "octuple": Encoding(
        name="octuple",
        fields=octuple.FIELDS,
        pitch_field=octuple.PITCH_FIELD,
        pitch_range=octuple.PITCH_RANGE,
        encode_score=octuple.encode_score,
        decode_words=octuple_decode.decode_words,
        place_words=octuple_decode.place_words,
    ),
    "cp": Encoding(
        name="cp",
        fields=cp.FIELDS,
        pitch_field=cp.PITCH_FIELD,
        pitch_range=cp.PITCH_RANGE,
        encode_score=cp.encode_score,
        decode_words=cp.decode_words,
        place_words=cp.place_words,
    ),
}


def load(name: str) -> Encoding:
    """The encoding called `name`, "octuple" or "cp". Raises ValueError for another name."""
    if name not in ENCODINGS:
        raise ValueError(f"no encoding is called {name!r}; there are {' and '.join(ENCODINGS)}")
    return ENCODINGS[name]
