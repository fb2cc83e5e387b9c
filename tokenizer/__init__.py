"""MIDI ↔ compound words, on mido and numpy.

    octuple = tokenizer.load("octuple")                     # or "cp"
    words = octuple.encode("piece.mid")                     # uint16 [notes, 8]
    words, notes = octuple.encode_with_sources("piece.mid") # and row for row the note each word came from
    octuple.decode(words).save("again.mid")

    tokenizer.build_store("folder/of/midi", "store")        # or: python -m amb.tokenizer folder/of/midi --out store
    store = tokenizer.open_store("store")                   # .words (memory-mapped), .pieces, .segments, .meta

Where to read: `midi.py` turns a file into arrays of notes; `octuple.py` and `cp.py` turn those into words, and with
`octuple_decode.py` and `midi_out.py` back; `encoding.py` is what both encodings look like from outside. `build.py`
makes a store of a whole corpus in parallel, with `find.py` and `store_writer.py`; `store.py` opens it.
"""

from .build import build_store
from .encoding import Encoded, Encoding, Field
from .midi import PERCUSSION, MidiError, Notes, Score, read_midi
from .registry import ENCODINGS, load
from .store import Piece, Store, StoreError, is_store, open_store
from .store_writer import Summary

__all__ = [
    "ENCODINGS",
    "Encoded",
    "Encoding",
    "Field",
    "MidiError",
    "Notes",
    "PERCUSSION",
    "Piece",
    "Score",
    "Store",
    "StoreError",
    "Summary",
    "build_store",
    "is_store",
    "load",
    "open_store",
    "read_midi",
]
