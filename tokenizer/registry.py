"""The encodings by name."""

from .cp import CP, MIDIBERT
from .encoding import Encoding
from .octuple import OCTUPLE

ENCODINGS = {encoding.name: encoding for encoding in (OCTUPLE, CP, MIDIBERT)}


def load(name: str) -> Encoding:
    """The encoding called `name`. Raises ValueError, which lists the names, for another one."""
    if name not in ENCODINGS:
        raise ValueError(f"no encoding is called {name!r}; there are {', '.join(ENCODINGS)}")
    return ENCODINGS[name]
