"""MIDI ↔ compound words, on mido and numpy.

    octuple = tokenizer.load("octuple")                     # or "cp", "midibert"
    words = octuple.encode("piece.mid")                     # uint16 [notes, 8]
    words, notes = octuple.encode_with_sources("piece.mid") # and row for row the note each word came from
    octuple.decode(words).save("again.mid")

    tokenizer.build_store("folder/of/midi", "store")        # or: python -m amb.tokenizer folder/of/midi --out store
    store = tokenizer.open_store("store")                   # .words (memory-mapped), .pieces, .segments, .meta

Where to read: `midi.py` turns a file into arrays of notes and back; `octuple.py` and `cp.py` turn those into words and
back; `encoding.py` is what all encodings look like from outside. `build.py` makes a store of a whole corpus in
parallel; `store.py` writes and opens it. `edit.py` rewrites a MIDI file note by note.
"""

from .build import SUFFIXES, build_store, cores, encode_file, find_midi, outcome_of, run
from .encoding import Encoded, Encoding, Field
from .midi import PERCUSSION, MidiError, Notes, Score, read_midi
from .registry import ENCODINGS, load
from .store import Piece, Store, StoreError, is_store, open_store
