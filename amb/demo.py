"""A demo corpus: short piano pieces, composed from tables and written as MIDI, with labels for all four tasks.

Four styles stand for composers (folder names) and the quadrants of valence and arousal for emotions (file names: Q1
happy, Q2 tense, Q3 sad, Q4 calm). Each piece has the tracks MELODY, BRIDGE and PIANO, like POP909, and dynamics that
follow metre, phrase and voice. A piece is four or five phrases of eight bars (AABA and the like).

A masked model can recover much: phrases return, motifs repeat inside them, chords follow a Markov chain per style and
end in cadences, the accompaniment repeats one figure, strong beats have chord tones. Nothing in the context determines
the ornaments, which are drawn anew each time, and the last few units of velocity and timing.

Pitches are scale degrees until they are written: 0 is the tonic near middle C, 7 its octave. Time is in sixteenths.
Every random choice is a Generator.random() of the piece's generator, so that bytes are equal on all machines.
"""

import os
import re
import tempfile
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import mido
import numpy as np

from amb.files import naming
from amb.tokenizer.midi import Part, write_midi

VERSION = 3  # raise it with any change of the notes; it is part of the folder's name
SIXTEENTH = 120  # ticks

IONIAN, AEOLIAN = (0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10)


class Style(NamedTuple):
    """How one composer writes. A pattern is one bar, a character per sixteenth: a sign sounds until the next one,
    a dot holds, a dash rests. Digits: bass, at that interval over the root. x y z: the chord's voices from below.
    C: all three; c: the upper two; H: bass and upper two. Patterns run from sparse to dense."""

    metre: tuple[int, int]
    tempo: int  # quarter notes a minute, before the mood changes it
    changes: int  # chords a bar
    harmony: dict[int, str]  # chord: its successors, as often as they are likely
    melody: tuple[str, ...]  # rhythms; the first one also serves for cadences
    piano: tuple[str, ...]
    hands: int  # the lowest degree of the chords
    gate: float  # sounding share of a written length
    bar: int  # sixteenths
    beat: int


# fmt: off
STYLES = {
    "chorale": Style((4, 4), 92, 2,
        {1: "1456", 2: "55", 3: "46", 4: "1255", 5: "1116", 6: "245"},
        ("x...x...x.......", "x...x...x...x...", "x...x.x.x...x...", "x.x.x...x.x.x..."),
        ("H.......H.......", "H...H...H...H..."), -7, 1.0, 16, 4),
    "ragtime": Style((4, 4), 104, 1,
        {1: "1446", 2: "55", 3: "6", 4: "115", 5: "1112", 6: "22"},
        ("x..x..x.x.......", "x..x..x.x..x..x.", "--x.xx.xx..x..x.", "xx.xx.x.xx.xx.x."),
        ("1.......5...C...", "1...C...5...C..."), -6, 0.8, 16, 4),
    "waltz": Style((3, 4), 126, 1,
        {1: "1256", 2: "55", 3: "6", 4: "52", 5: "1113", 6: "24"},
        ("x...........", "x.......x...", "x...x...x...", "x...x.x.x.x."),
        ("1...c.......", "1...C...C..."), -6, 0.85, 12, 4),
    "barcarolle": Style((6, 8), 104, 1,
        {1: "1346", 2: "55", 3: "46", 4: "25", 5: "1116", 6: "244"},
        ("x...........", "x.....x...x.", "x...x.x...x.", "x.x.x.x.x.x."),
        ("1...y.z...y.", "1.x.y.z.y.x."), -5, 0.95, 12, 6),
}
# fmt: on
MOODS = {"Q1": (False, 0.45, 1.0), "Q2": (True, 0.45, 1.0), "Q3": (True, 0.0, 0.55), "Q4": (False, 0.0, 0.55)}
# mood: minor mode?, least and most arousal, which sets tempo, density, loudness and, a little, register

FORMS = {16: ("AABA", "AABB", "ABAB", "ABCA"), 12: ("AABBA", "AABCA", "ABACA")}  # short bars make longer forms
PLANS = ("aabhaabc", "abahabac", "aabhbbac")  # motif of each bar; h: half cadence, c: cadence
ARCH = (0, 1, 2, 1, 2, 4, 3, 0)  # rise and fall of a phrase by bar: degrees for its melody, four times that in velocity
CADENCE = (0, 1, -1, -1)  # contour, in steps from note to note
CONTOURS = ((-1, -1, -2, 1, 1, 2), (-1, -1, -1, -2, 1, 1))  # steps of motifs: major; minor, which sighs downwards
ROLES = {"MELODY": (10, 0.16), "BRIDGE": (0, 0.1), "PIANO": (-8, 0.01)}  # track: velocity, share of ornaments


def pick(rng, options):
    return options[int(rng.random() * len(options))]


def onsets(pattern):
    """(start, length, sign) of each sound in a bar."""
    return [(sound.start(), len(sound[0]), sound[0][0]) for sound in re.finditer(r"[^.-]\.*", pattern)]


def nearest(chord, degree):
    """The tone of the triad on `chord` closest to a degree: it is never more than one step away."""
    return next(degree + k for k in (0, -1, 1) if (degree + k - chord) % 7 in (0, 2, 4))


def progression(rng, style, first):
    """Roots (0–6) of eight bars' chords: a walk from `first`, a half cadence in the middle, a full one at the end."""
    chords = [first]
    while len(chords) < 8 * style.changes:
        chords.append(int(pick(rng, style.harmony[chords[-1]])))
    chords[len(chords) // 2 - 1] = 5
    chords[-3:] = [pick(rng, (4, 2)), 5, 1]
    return [chord - 1 for chord in chords]


def line(style, rhythm, contour, chords, centre):
    """One bar of a voice along the contour: chord tones on beats, at most five steps from the centre."""
    degree = centre
    for (step, length, _), move in zip(onsets(rhythm), cycle(contour), strict=False):
        degree += move if abs(degree + move - centre) <= 5 else -move
        chord = chords[step * len(chords) // style.bar]
        if step % style.beat == 0:
            degree = nearest(chord, degree)
        yield step, length, degree, chord


def accompaniment(style, figure, chords):
    """One bar of PIANO: a bass and triads in close position."""
    for step, length, sign in onsets(figure):
        chord = chords[step * len(chords) // style.bar]
        x, y, z = [d for d in range(style.hands, style.hands + 7) if (d - chord) % 7 in (0, 2, 4)]
        bass = (chord + 2) % 7 - 16  # the root, between the fifths below and above the low tonic
        hands = {"x": [x], "y": [y], "z": [z], "C": [x, y, z], "c": [y, z], "H": [bass, y, z]}
        yield from ((step, length, degree, chord) for degree in hands.get(sign) or [bass + int(sign) - 1])


def phrase(rng, style, minor, arousal, first, motifs, register):
    """Eight bars: {track: [(start, length, degree, chord)]}, without ornaments and dynamics."""

    def grade(patterns):  # the higher the arousal, the denser
        return patterns[int((arousal + rng.random()) / 2 * len(patterns))]

    for name in "ab":
        if name not in motifs:
            motifs[name] = grade(style.melody), [0] + [pick(rng, CONTOURS[minor]) for _ in range(7)]
    roots, figure, plan = progression(rng, style, first), grade(style.piano), pick(rng, PLANS)
    tracks = {track: [] for track in ROLES}
    for index, name in enumerate(plan):
        chords = roots[index * style.changes : (index + 1) * style.changes]
        rhythm, contour = motifs.get(name, (style.melody[0], CADENCE))
        tune = list(line(style, rhythm, contour, chords, register + ARCH[index]))
        if name == "c":  # a cadence ends on the tonic
            step, length, degree, chord = tune[-1]
            tune[-1] = step, length, 7 * round(degree / 7), chord
        second = line(style, style.melody[1], (0, 1, -1), chords, register - 5)
        for track, notes in zip(ROLES, (tune, second, accompaniment(style, figure, chords)), strict=True):
            tracks[track] += [(index * style.bar + step, *rest) for step, *rest in notes]
    return tracks


def ornament(rng, notes, rate):
    """Neighbour tones inside a random share of the longer notes, drawn anew for every occurrence of a phrase."""
    for start, length, degree, chord in notes:
        if length >= 4 and rng.random() < rate:
            length /= 2
            yield start, length, degree, chord
            start, degree = start + length, degree + pick(rng, (-1, 1))
        yield start, length, degree, chord


def velocity(rng, style, start, level):
    """A level changed by metre and phrase, and by a little noise."""
    step, bar = start % style.bar, min(7, int(start // style.bar))
    accent = -5 if step % style.beat else 12 if step == 0 else 7 if 2 * step == style.bar else 3
    return min(126, max(4, round(level + accent + 4 * ARCH[bar] + 8 * rng.random() - 4)))


def compose(name: str, mood: str, rng: np.random.Generator) -> mido.MidiFile:
    """One piece in the style of that name: 480 ticks a beat, a track of tempi and three of notes."""
    style, (minor, least, most) = STYLES[name], MOODS[mood]
    arousal = least + (most - least) * rng.random()
    tempo = style.tempo * (0.72 + 0.6 * arousal + 0.08 * rng.random())
    level = 28 + 50 * arousal + 6 * rng.random()
    gate = style.gate - (0 if minor else 0.15)  # bright pieces are articulated more lightly
    register = pick(rng, (3, 4, 5)) - 2 * minor + round(2 * arousal)
    tonic, scale = pick(rng, range(-5, 7)), AEOLIAN if minor else IONIAN

    form, first = pick(rng, FORMS[style.bar]), {"A": 1, "B": pick(rng, (4, 5)), "C": 4}
    motifs, phrases = {}, {}
    for letter in sorted(set(form)):  # each new phrase keeps one motif and brings another
        motifs.pop("b", None)
        phrases[letter] = phrase(rng, style, minor, arousal, first[letter], motifs, register)

    parts = []
    for track, (loudness, ornaments) in ROLES.items():
        notes = {}  # (pitch, start): (end, velocity), in ticks
        for place, letter in enumerate(form):
            for start, length, degree, chord in ornament(rng, phrases[letter][track], ornaments):
                leading = chord == 4 and degree % 7 == 6 and minor  # the dominant has its leading tone
                pitch = 60 + tonic + 12 * (degree // 7) + scale[degree % 7] + leading
                tick = round((place * 8 * style.bar + start) * SIXTEENTH)
                if rng.random() < 0.15:  # uneven timing, as of a player
                    tick = max(0, tick + round(50 * rng.random() - 25))
                end = tick + max(30, round(length * gate * SIXTEENTH))
                notes[pitch, tick] = end, velocity(rng, style, start, level + loudness)
        rows, following = [], {}
        for (pitch, start), (end, loud) in sorted(notes.items(), reverse=True):
            rows.append((start, min(end, following.get(pitch, end)), pitch, loud))  # it ends where the next one begins
            following[pitch] = start
        parts.append(Part(track, 0, np.array(sorted(rows))))
    bar, last = style.bar * SIXTEENTH, (8 * len(form) - 1) * style.bar * SIXTEENTH  # the last bar slows down
    tempos = [(tick, round(60e6 / (tempo * share))) for tick, share in ((0, 1), (last, 0.9), (last + bar // 2, 0.8))]
    return write_midi(parts, tempos, [(0, *style.metre)])


def write_corpus(folder: str | Path, pieces: int = 160, seed: int = 0) -> Path:
    """Write `pieces` MIDI files `folder/STYLE/Qn_STYLE_iii.mid`, all or none; a folder that exists is left as it is.

    Styles alternate fastest, then moods: a multiple of 16 pieces is balanced in both. The same seed gives the same
    bytes, and piece i is the same in a corpus of any size.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with naming(folder), tempfile.TemporaryDirectory(dir=folder.parent, prefix=".demo-") as beside:
        for i in range(pieces):
            style, mood = list(STYLES)[i % 4], list(MOODS)[i // 4 % 4]
            path = Path(beside, "corpus", style, f"{mood}_{style}_{i:03d}.mid")
            path.parent.mkdir(parents=True, exist_ok=True)
            compose(style, mood, np.random.default_rng(np.random.SeedSequence([seed, i]))).save(path)
        try:
            os.replace(Path(beside, "corpus"), folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    return folder
