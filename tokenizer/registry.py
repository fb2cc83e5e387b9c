"""The encodings there are, by name."""

from tokenizer import cp, octuple
from tokenizer.encoding import Encoding

ENCODINGS = {encoding.name: encoding for encoding in (octuple.ENCODING, cp.ENCODING)}


def load(name: str) -> Encoding:
    """The encoding called `name`, "octuple" or "cp". Raises ValueError for another name."""
    if name not in ENCODINGS:
        raise ValueError(f"no encoding is called {name!r}; there are {' and '.join(ENCODINGS)}")
    return ENCODINGS[name]
