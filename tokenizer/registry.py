"""The encodings by name."""

from . import cp, octuple
from .encoding import Encoding

ENCODINGS = {encoding.name: encoding for encoding in (octuple.ENCODING, cp.ENCODING)}


def load(name: str) -> Encoding:
    """The encoding called `name`. Raises ValueError, which lists the names, for another one."""
    if name not in ENCODINGS:
        raise ValueError(f"no encoding is called {name!r}; there are {' and '.join(ENCODINGS)}")
    return ENCODINGS[name]
