"""A corpus of our own: short piano pieces, composed from tables and written as MIDI, with labels for all four tasks.

    python -m amb.demo --out DIR [--pieces N] [--seed S]

Eight styles stand for eight composers (folder names) and Russell's four quadrants of valence and arousal for the
emotions (file names: Q1 happy, Q2 tense, Q3 sad, Q4 calm). Each piece has the tracks MELODY, BRIDGE and PIANO, like
POP909, and dynamics that follow metre, phrase and voice. A piece is four phrases of eight bars (AABA and the like).

What a masked model can recover: phrases return, motifs repeat inside them, chords follow a Markov chain of functions
per style and end in cadences, the accompaniment repeats one figure, strong beats carry chord tones. What nothing in
the context determines: ornaments, drawn afresh each time, and the last few units of velocity and timing.

Pitches are scale degrees until they are written: 0 is the tonic near middle C, 7 its octave. Time is in sixteenths.
Every random choice is a Generator.random() of the piece's own generator, so that bytes agree wherever they are made.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import mido
import numpy as np

from amb.files import naming

VERSION = 1  # raise it with any change to the notes: an older corpus is then not taken for this one
PIECES = 160
SIXTEENTH = 120  # ticks

IONIAN, MIXOLYDIAN = (0, 2, 4, 5, 7, 9, 11), (0, 2, 4, 5, 7, 9, 10)
AEOLIAN, DORIAN = (0, 2, 3, 5, 7, 8, 10), (0, 2, 3, 5, 7, 9, 10)


class Style(NamedTuple):
    """How one 'composer' writes. A pattern is one bar, a character per sixteenth: a sign sounds until the next one,
    a dot holds, a dash rests. Digits: bass, at that interval over the root. x y z: the chord's voices from below.
    C: all three; c: the upper two; H: bass and upper two. Patterns run from sparse to dense."""

    metre: tuple[int, int]
    tempo: int  # quarter notes a minute, before the mood changes it
    scales: tuple[tuple[int, ...], tuple[int, ...]]  # major, minor
    changes: int  # chords a bar
    harmony: dict[int, str]  # chord: its successors, as often as they are likely
    melody: tuple[str, ...]  # rhythms; the first one also serves for cadences
    piano: tuple[str, ...]
    bridge: str  # thirds: under the melody; counter: a slower line below; answer: fills the cadences from above
    hands: int  # lowest voice of the tonic chord
    gate: float  # sounding share of a written length
    swing: int = 0  # ticks by which the second half of a beat is late

    @property
    def bar(self):
        return len(self.piano[0])

    @property
    def beat(self):
        return 6 if self.metre[1] == 8 else 4


# fmt: off
KEYS = (("C", "Db", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B"),  # major, minor
        ("Cm", "C#m", "Dm", "Ebm", "Em", "Fm", "F#m", "Gm", "G#m", "Am", "Bbm", "Bm"))
STYLES = {
    "chorale": Style((4, 4), 92, (IONIAN, AEOLIAN), 2,
        {1: "1456", 2: "55", 3: "46", 4: "1255", 5: "1116", 6: "245"},
        ("x...x...x.......", "x...x...x...x...", "x...x.x.x...x...", "x.x.x...x.x.x..."),
        ("H.......H.......", "H...H...H...H..."), "thirds", -7, 1.0),
    "sonatina": Style((4, 4), 108, (IONIAN, AEOLIAN), 1,
        {1: "1145", 2: "5", 3: "6", 4: "115", 5: "1116", 6: "24"},
        ("x...x...x.......", "x.....x.x...x...", "x...x.x.xxx.x...", "x.xxx.x.x.x.xxx."),
        ("x...z...y...z...", "x.z.y.z.x.z.y.z."), "counter", -5, 0.9),
    "ragtime": Style((4, 4), 104, (IONIAN, AEOLIAN), 1,
        {1: "1446", 2: "55", 3: "6", 4: "115", 5: "1112", 6: "22"},
        ("x..x..x.x.......", "x..x..x.x..x..x.", "--x.xx.xx..x..x.", "xx.xx.x.xx.xx.x."),
        ("1.......5...C...", "1...C...5...C..."), "answer", -6, 0.8),
    "boogie": Style((4, 4), 112, (MIXOLYDIAN, DORIAN), 1,
        {1: "1144", 2: "5", 4: "4117", 5: "44", 7: "4"},
        ("x.....x.x.......", "--x.x...--x.x...", "x.x.x.x...x.x...", "x.xxx.x.x.xxx.x."),
        ("1...5...6...5...", "1.3.5.6.8.6.5.3."), "answer", -7, 0.85, 60),
    "waltz": Style((3, 4), 126, (IONIAN, AEOLIAN), 1,
        {1: "1256", 2: "55", 3: "6", 4: "52", 5: "1113", 6: "24"},
        ("x...........", "x.......x...", "x...x...x...", "x...x.x.x.x."),
        ("1...c.......", "1...C...C..."), "counter", -6, 0.85),
    "minimal": Style((3, 4), 104, (IONIAN, DORIAN), 1,
        {1: "1366", 2: "4", 3: "6", 4: "11", 5: "6", 6: "334"},
        ("x...........", "x.....x.....", "x.......x.x.", "x..x..x..x.."),
        ("x.y.z.x.y.z.", "xyzyxyzyxyzy"), "thirds", -3, 1.0),
    "lullaby": Style((6, 8), 88, (IONIAN, AEOLIAN), 1,
        {1: "114", 4: "11", 5: "11", 6: "4"},
        ("x...........", "x.....x.....", "x...x.x.....", "x...x.x...x."),
        ("1.....c.....", "1...x.z...y."), "counter", -5, 0.95),
    "barcarolle": Style((6, 8), 104, (IONIAN, AEOLIAN), 1,
        {1: "1346", 2: "55", 3: "46", 4: "25", 5: "1116", 6: "244"},
        ("x...........", "x.....x...x.", "x...x.x...x.", "x.x.x.x.x.x."),
        ("1...y.z...y.", "1.x.y.z.y.x."), "thirds", -5, 0.95),
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
PROGRAMS = (0,) * 12 + (4, 6, 11)  # drawn for a whole piece, whatever its style: instruments carry no label


def pick(rng, options):
    return options[int(rng.random() * len(options))]


def onsets(pattern):
    """(start, length, sign) of each sound in a bar."""
    starts = [i for i, sign in enumerate(pattern) if sign != "."]
    ends = starts[1:] + [len(pattern)]
    return [(s, e - s, pattern[s]) for s, e in zip(starts, ends, strict=True) if pattern[s] != "-"]


def nearest(chord, degree):
    """The tone of the triad on `chord` closest to a degree: it is never more than one step away."""
    return next(degree + k for k in (0, -1, 1) if (degree + k - chord) % 7 in (0, 2, 4))


def progression(rng, style, first):
    """Roots (0–6) of eight bars' chords: a walk from `first`, a half cadence in the middle, a full one at the end."""
    length = 8 * style.changes
    chords = [first]
    while len(chords) < length:
        chords.append(int(pick(rng, style.harmony[chords[-1]])))
    chords[length // 2 - 1] = 5
    chords[-3:] = [pick(rng, (4, 2)) if 2 in style.harmony else 4, 5, 1]
    return [c - 1 for c in chords]


def line(style, rhythm, contour, chords, centre):
    """One bar of one voice: the contour leads, chords claim the beats, and it turns back five steps from the centre."""
    degree = centre
    for (step, length, _), move in zip(onsets(rhythm), cycle(contour), strict=False):
        degree += move if abs(degree + move - centre) <= 5 else -move
        chord = chords[step * len(chords) // style.bar]
        if step % style.beat == 0:
            degree = nearest(chord, degree)
        yield step, length, degree, chord


def second_line(style, name, tune, motif, chords, centre):
    """One bar of BRIDGE, by the style's habit."""
    if style.bridge == "thirds":
        return [(s, n, nearest(chord, d - 2), chord) for s, n, d, chord in tune if s % style.beat == 0]
    if style.bridge == "counter":
        return line(style, style.melody[1], (0, 1, -1), chords, centre - 5)
    if name in "hc":  # the answer: the first motif, upside down, while the melody rests on its cadence
        return line(style, motif[0], [-move for move in motif[1]], chords, centre + 3)
    return line(style, style.melody[0], (0, -1), chords, centre - 4)


def voicing(chord, previous):
    """The close position of a triad that three voices reach with the least movement."""
    tones = [d for d in range(previous[0] - 4, previous[2] + 5) if (d - chord) % 7 in (0, 2, 4)]
    positions = [tones[i : i + 3] for i in range(len(tones) - 2)]
    return min(positions, key=lambda p: sum(abs(a - b) for a, b in zip(p, previous, strict=True)))


def accompaniment(style, figure, chords, voices):
    """One bar of PIANO; `voices` is moved along."""
    for step, length, sign in onsets(figure):
        chord = chords[step * len(chords) // style.bar]
        voices[:] = x, y, z = voicing(chord, voices)
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
    voices = [style.hands, style.hands + 2, style.hands + 4]
    tracks = {track: [] for track in ROLES}
    for index, name in enumerate(plan):
        chords = roots[index * style.changes : (index + 1) * style.changes]
        rhythm, contour = motifs.get(name, (style.melody[0], CADENCE))
        tune = list(line(style, rhythm, contour, chords, register + ARCH[index]))
        if name == "c":  # the last word is the tonic's
            step, length, degree, chord = tune[-1]
            tune[-1] = step, length, 7 * round(degree / 7), chord
        second = second_line(style, name, tune, motifs["a"], chords, register)
        for track, notes in zip(ROLES, (tune, second, accompaniment(style, figure, chords, voices)), strict=True):
            tracks[track] += [(index * style.bar + step, *rest) for step, *rest in notes]
    return tracks


def ornament(rng, notes, rate):
    """Grace notes before, and neighbours inside, some of the longer notes; no two occurrences of a phrase agree."""
    for start, length, degree, chord in notes:
        if length >= 4 and rng.random() < rate:
            neighbour = degree + pick(rng, (-1, 1))
            if start and rng.random() < 0.5:
                yield start - 0.5, 0.5, neighbour, chord
            else:
                yield start, length / 2, degree, chord
                start, length, degree = start + length / 2, length / 2, neighbour
        yield start, length, degree, chord


def velocity(rng, style, start, level):
    """What metre and phrase make of a level, and a little that nobody can know."""
    step, bar = start % style.bar, min(7, int(start // style.bar))
    accent = -5 if step % style.beat else 12 if step == 0 else 7 if 2 * step == style.bar else 3
    return min(126, max(4, round(level + accent + 4 * ARCH[bar] + 8 * rng.random() - 4)))


def compose(name, mood, rng):
    """One piece in the style of that name as a mido.MidiFile: type 1, 480 ticks a beat, conductor and three tracks."""
    style, (minor, least, most) = STYLES[name], MOODS[mood]
    arousal = least + (most - least) * rng.random()
    tempo = style.tempo * (0.72 + 0.6 * arousal + 0.08 * rng.random())
    level = 28 + 50 * arousal + 6 * rng.random()
    gate = style.gate - (0 if minor else 0.15)  # bright pieces are articulated more lightly
    register = pick(rng, (3, 4, 5)) - 2 * minor + round(2 * arousal)
    tonic, scale, program = pick(rng, range(-5, 7)), style.scales[minor], pick(rng, PROGRAMS)

    form, first = pick(rng, FORMS[style.bar]), {"A": 1, "B": pick(rng, (4, 5)), "C": 4}
    motifs, phrases = {}, {}
    for letter in sorted(set(form)):  # each new phrase keeps one motif and brings another
        motifs.pop("b", None)
        phrases[letter] = phrase(rng, style, minor, arousal, first[letter], motifs, register)

    file = mido.MidiFile(ticks_per_beat=4 * SIXTEENTH)
    file.tracks.append(conductor(rng, style, tempo, KEYS[minor][tonic], len(form), f"{mood} {name}"))
    for channel, (track, (loudness, ornaments)) in enumerate(ROLES.items()):
        sounding = {}  # (pitch, start): (end, velocity), in ticks
        for place, letter in enumerate(form):
            for start, length, degree, chord in ornament(rng, phrases[letter][track], ornaments):
                leading = chord == 4 and degree % 7 == 6 and scale[6] == 10  # the dominant has its leading tone
                pitch = 60 + tonic + 12 * (degree // 7) + scale[degree % 7] + leading
                tick = round((place * 8 * style.bar + start) * SIXTEENTH) + style.swing * (start % 4 >= 2)
                if rng.random() < 0.15:  # hands are not machines
                    tick = max(0, tick + round(50 * rng.random() - 25))
                end = tick + max(30, round(length * gate * SIXTEENTH))
                sounding[pitch, tick] = end, velocity(rng, style, start, level + loudness)
        file.tracks.append(played(track, channel, program, sounding))
    return file


def conductor(rng, style, tempo, key, phrases, name):
    """The first track: metre, key, and the tempo, which gives way at the end of some phrases and of the last one."""
    track = mido.MidiTrack([mido.MetaMessage("track_name", name=name)])
    track.append(mido.MetaMessage("time_signature", numerator=style.metre[0], denominator=style.metre[1]))
    track.append(mido.MetaMessage("key_signature", key=key))
    bar, now, changes = style.bar * SIXTEENTH, 0, [(0, 1.0)]
    for end in range(8 * bar, (8 * phrases + 1) * bar, 8 * bar):
        if end == 8 * phrases * bar or rng.random() < 0.3:
            changes += [(end - bar, 0.9), (end - bar // 2, 0.8), (end, 1.0)]
    for tick, share in changes[:-1]:
        track.append(mido.MetaMessage("set_tempo", tempo=round(60_000_000 / (tempo * share)), time=tick - now))
        now = tick
    return track


def played(name, channel, program, sounding):
    """A track of {(pitch, start): (end, velocity)}; a note ends at the latest where the next of its pitch begins."""
    events, following = [], {}
    for (pitch, start), (end, loudness) in sorted(sounding.items(), reverse=True):
        events += [(start, 1, pitch, loudness), (min(end, following.get(pitch, end)), 0, pitch, 0)]
        following[pitch] = start
    track = mido.MidiTrack([mido.MetaMessage("track_name", name=name)])
    track.append(mido.Message("program_change", channel=channel, program=program))
    now = 0
    for tick, _, pitch, loudness in sorted(events):  # at one tick, ends come before starts
        track.append(mido.Message("note_on", channel=channel, note=pitch, velocity=loudness, time=tick - now))
        now = tick
    return track


def digest(folder):
    """SHA-256 of the names and contents of a folder's MIDI files, in order of name."""
    sha = hashlib.sha256()
    for path in sorted(folder.glob("*/*.mid"), key=lambda path: path.as_posix()):
        sha.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return sha.hexdigest()


def holds(folder, wanted):
    """Whether a folder holds, unchanged, the corpus that its demo.json describes and `wanted` asks for."""
    try:
        manifest = json.loads((folder / "demo.json").read_text())
        return manifest == {**wanted, "sha256": digest(folder)}
    except (OSError, ValueError):
        return False


def write_corpus(folder, pieces=PIECES, seed=0):
    """Write `pieces` MIDI files `folder/STYLE/Qn_STYLE_iii.mid`, with a demo.json beside the styles; return the Path.

    Styles alternate fastest, then moods: a multiple of 32 pieces is balanced in both. The same seed gives the same
    bytes, and piece i is the same in a corpus of any size. The corpus appears at once, by a rename; one that is
    there already, unchanged, is kept. ValueError if the folder holds anything else, or if there are no pieces."""
    folder = Path(folder)
    wanted = {"version": VERSION, "pieces": pieces, "seed": seed}
    if pieces < 1 or seed < 0:
        raise ValueError(f"a demo corpus needs at least 1 piece and a seed of at least 0, not {pieces} and {seed}")
    if holds(folder, wanted):
        return folder
    if folder.is_file() or folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} exists and is not the demo corpus asked for: remove it or name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with naming(folder), tempfile.TemporaryDirectory(dir=folder.parent, prefix=".demo-") as beside:
        work = Path(beside) / "corpus"
        for i in range(pieces):
            style, mood = list(STYLES)[i % 8], list(MOODS)[i // 8 % 4]
            (work / style).mkdir(parents=True, exist_ok=True)
            piece = compose(style, mood, np.random.default_rng(np.random.SeedSequence([seed, i])))
            piece.save(work / style / f"{mood}_{style}_{i:03d}.mid")
        (work / "demo.json").write_text(json.dumps({**wanted, "sha256": digest(work)}, indent=1) + "\n")
        try:
            os.replace(work, folder)
        except OSError:  # another process was faster
            if not holds(folder, wanted):
                raise
    return folder


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m amb.demo", description="write the demo corpus as MIDI files")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write, which must not exist or be empty")
    parser.add_argument("--pieces", type=int, default=PIECES, metavar="N", help="number of pieces (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the corpus (%(default)s)")
    args = parser.parse_args(arguments)
    try:
        print(write_corpus(args.out, args.pieces, args.seed))
    except (ValueError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
