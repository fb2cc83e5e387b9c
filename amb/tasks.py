"""The understanding tasks: what is labelled, where labels come from, and what the model must not see.

| task | level | classes | labels from |
|---|---|---|---|
| melody | note | MELODY, BRIDGE, PIANO | track names (POP909) |
| velocity | note | 6 bins, edges 0 32 48 64 80 96 128 | the notes' velocities |
| composer | sequence | folder names (Pianist8) | the folder |
| emotion | sequence | Q1 … Q4, the quadrants of valence and arousal | EMOPIA's file names or VGMIDI's csv |
| note | note | track names of your files | track names |
| sequence | sequence | yours | a folder per class, or a csv (path, label and, if you like, group) |

**No label can be read from the input.** Where labels are track names, all pitched notes become piano, of one track,
before they are encoded, so that neither Instrument nor the order of the words depends on tracks (`without_tracks`).
Where labels are velocities, all notes are encoded with one velocity (`without_velocities`), and the field is MASK in
every input. Labels are read beside the words, from the file itself, and kept with them in the token store.
"""

import csv
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np

from amb import splits, tokenizer
from amb.data import Sequences
from amb.tokenizer import Score

VELOCITY_EDGES = (32, 48, 64, 80, 96)  # between the six bins; 0 and 128 bound them
VELOCITY_BINS = ("0-31", "32-47", "48-63", "64-79", "80-95", "96-127")
QUADRANT = {(True, True): "Q1", (False, True): "Q2", (False, False): "Q3", (True, False): "Q4"}  # valence, arousal > 0
IGNORED = -1  # the label of what has none


def without_tracks(score: Score) -> tuple[Score, np.ndarray]:
    """The score as if all its pitched notes were one piano track; and, row for row, which note of `score` each one is.

    The order of the rows depends on the music alone; notes that differ in nothing are shuffled.
    """
    notes = score.notes
    shuffled = np.random.default_rng(len(notes.pitch)).permutation(len(notes.pitch))
    rows = np.lexsort((shuffled, notes.velocity, notes.end, notes.pitch, notes.start))
    notes = notes.take(rows)
    pitched = notes.instrument != tokenizer.PERCUSSION
    one = np.zeros_like(rows)
    notes = notes._replace(track=one, program=one, channel=np.where(pitched, 0, notes.channel))
    return score._replace(notes=notes), rows


def without_velocities(score: Score) -> tuple[Score, np.ndarray]:
    """The score with velocity 64 throughout, which also keeps the order of the words from depending on velocities."""
    notes = score.notes
    return score._replace(notes=notes._replace(velocity=np.full_like(notes.velocity, 64))), np.arange(len(notes.pitch))


without_velocities.hides = ("velocity",)  # pieces that differ in dynamics are then no duplicates


@dataclass(frozen=True)
class Task:
    """`classes` are None where they come from the data. `hidden` is a field that is MASK in every input."""

    name: str
    level: str  # "note" or "sequence"
    classes: tuple[str, ...] | None = None
    view: Callable[[Score], tuple[Score, np.ndarray]] | None = None
    hidden: str | None = None


TASKS = {
    task.name: task
    for task in (
        Task("melody", "note", ("MELODY", "BRIDGE", "PIANO"), view=without_tracks),
        Task("velocity", "note", VELOCITY_BINS, without_velocities, "Velocity"),
        Task("composer", "sequence"),
        Task("emotion", "sequence", tuple(QUADRANT.values())),
        Task("note", "note", view=without_tracks),
        Task("sequence", "sequence"),
    )
}


@dataclass(frozen=True)
class Labelled:
    """A token store with its labels: indices into `classes`, or IGNORED.

    `labels`: int64 [pieces] for sequence tasks, int16 [words of the store] for note tasks. `groups`: pieces of one
    group stay on one side of a split. `absent`: what a csv file names and the store does not have.
    """

    task: Task
    store: tokenizer.Store
    classes: tuple[str, ...]
    labels: np.ndarray
    groups: list[str]
    absent: list[str]

    @property
    def of_piece(self) -> np.ndarray:
        """int [pieces]. In note tasks 0 for a piece with any label: POP909's alternative versions have other tracks."""
        if self.task.level == "sequence":
            return self.labels
        return np.minimum(np.maximum.reduceat(self.labels, [piece.offset for piece in self.store.pieces]), 0)


def read_labels(task: Task, store: tokenizer.Store, folder: Path, csv_file: Path | None = None) -> Labelled:
    """The labels of all pieces of a store that was built from `folder` (with `origins`, for note tasks).

    Raises ValueError, in one line, where there are none, fewer than two classes, or where a csv file is wrong.
    """
    paths = [piece.path for piece in store.pieces]
    groups, absent = [splits.song(path) for path in paths], []
    if task.level == "note":
        names = [name.strip() or None for name in store.tracks]
    elif csv_file:
        names, groups, absent = _from_csv(csv_file, paths)
    elif task.name == "emotion":
        names, groups = _emotions(folder, paths)
    else:
        names = _from_folders(folder, paths)
    classes = task.classes or tuple(sorted(set(names) - {None}))
    labels = np.array([classes.index(name) if name in classes else IGNORED for name in names])
    if task.name == "velocity":
        labels = np.searchsorted(VELOCITY_EDGES, store.velocity, side="right").astype(np.int16)
    elif task.level == "note":
        labels = labels.astype(np.int16)[store.track]
    elif unknown := sorted(set(names) - {None, *classes}):
        raise ValueError(f"{csv_file or folder}: {unknown[0]!r} is not a class of {task.name}: {', '.join(classes)}")
    if (labels == IGNORED).all():
        if task.level == "sequence":
            raise ValueError(f"{folder}: no file has a label for {task.name}")
        there = ", ".join(map(repr, store.tracks[:5]))
        raise ValueError(f"{folder}: no track is named {' or '.join(classes) or 'anything'}; tracks there: {there}")
    if len(classes) < 2:
        skipped = sum(store.meta["skipped"].values())
        more = f"; {skipped:,} files could not be used" if skipped else ""
        raise ValueError(f"{folder}: {task.name} needs two classes at least, and there is {classes[0]}{more}")
    return Labelled(task, store, classes, labels, groups, absent)


def without_untrained(labelled: Labelled, roles: list[str]) -> tuple[Labelled, list[str], list[str]]:
    """Leave out the classes of which no note, or no piece, trains: labels, roles, and a remark on each such class.

    Raises ValueError where fewer than two classes train.
    """
    labels, unit, training = labelled.labels, "piece", np.array(roles) == "train"
    if labelled.task.level == "note":
        unit, training = "note", np.repeat(training, [piece.notes for piece in labelled.store.pieces])
    trained = np.isin(range(len(labelled.classes)), labels[training])
    if trained.all():
        return labelled, roles, []
    classes = np.array(labelled.classes)
    if trained.sum() < 2:
        lost = ", ".join(classes[~trained])
        raise ValueError(f"no {unit} of {lost} is left to train on, and one class cannot be learned alone")
    remarks = [
        f"class {labelled.classes[label]!r} has no {unit} to train on: the model does not have it, and the "
        f"{(labels == label).sum():,} {unit}s of it do not count"
        for label in np.flatnonzero(~trained)
    ]
    number = np.append(np.where(trained, trained.cumsum() - 1, IGNORED), IGNORED)  # its last element is for IGNORED
    labels = number[labels].astype(labels.dtype)
    labelled = replace(labelled, classes=tuple(classes[trained].tolist()), labels=labels)
    roles = [role if label >= 0 else "unused" for role, label in zip(roles, labelled.of_piece, strict=True)]
    return labelled, roles, remarks


def labels_of(labelled: Labelled, sequences: Sequences, numbers: np.ndarray | None = None) -> np.ndarray:
    """The labels of the sequences with these numbers (all): int64 [S] for sequence tasks, int16 [S, L] for note tasks.

    EOS and PAD have the label -1.
    """
    numbers = np.arange(len(sequences)) if numbers is None else numbers
    if labelled.task.level == "sequence":
        return labelled.labels[sequences.piece[numbers]]
    rows, filled = sequences.places(numbers)
    return np.where(filled, labelled.labels[np.minimum(rows, len(labelled.labels) - 1)], np.int16(IGNORED))


def hide(task: Task, encoding: tokenizer.Encoding, words: np.ndarray) -> np.ndarray:
    """Words [..., F] with MASK in the field that the task must not see, in every note; EOS and PAD stay."""
    for index, field in enumerate(encoding.fields):
        if field.name == task.hidden:
            words = words.copy()
            words[..., index] = np.where(words[..., index] < field.values, field.mask, words[..., index])
    return words


def inverse_frequency(labels: np.ndarray, classes: int) -> np.ndarray:
    """float32 [C]: class weights whose mean over the labels is 1; IGNORED labels do not count."""
    counts = np.bincount(labels[labels != IGNORED], minlength=classes)
    return (counts.sum() / np.maximum(counts, 1) / max(1, (counts > 0).sum())).astype(np.float32)


def _from_folders(folder: Path, paths: list[str]) -> list[str]:
    """The first folder below the one that all files share (Pianist8/midi/ARTIST/… is labelled ARTIST)."""
    folders = [PurePosixPath(path).parts[:-1] for path in paths]
    shared = len(os.path.commonprefix(folders))
    for path, parts in zip(paths, folders, strict=True):
        if len(parts) <= shared:
            raise ValueError(f"{folder}: {path} is in no class folder; expected one folder per class")
    return [parts[shared] for parts in folders]


def _from_csv(file: Path, paths: list[str]) -> tuple[list[str | None], list[str], list[str]]:
    """Labels and groups of a csv file with the columns path, label and maybe group; and the paths that are not there.

    Paths are relative to the data's folder, or as `splits.matches` takes them.
    """
    by_name = {}
    for number, row in enumerate(_read_csv(file), start=2):
        if not row.get("path") or not row.get("label"):
            raise ValueError(f"{file}, line {number}: expected the columns path and label")
        first = by_name.setdefault("/".join(splits.endings(row["path"])[:1]), row)
        if first["label"] != row["label"]:
            raise ValueError(f"{file} labels {row['path']} both {first['label']!r} and {row['label']!r}")
    stand = splits.matches(paths, by_name)
    absent = sorted(set(by_name) - set(stand))  # unusable, duplicates of others, or misspelt
    if len(absent) == len(by_name):
        example = f"{absent[0]} for one" if absent else "it has no rows"
        raise ValueError(f"{file} names none of the usable MIDI files of the data: {example}")
    labels = [name and by_name[name]["label"] for name in stand]
    groups = [by_name.get(name, {}).get("group") or splits.song(path) for name, path in zip(stand, paths, strict=True)]
    return labels, groups, absent


def _emotions(folder: Path, paths: list[str]) -> tuple[list[str | None], list[str]]:
    """Quadrants and groups: by VGMIDI's csv where one lies in or above the folder, else by names like Q1_….mid.

    Groups are VGMIDI's games, and the recordings that EMOPIA's clips are cut from (Q1_0vLPYiPN7qY_2.mid).
    """
    names = [PurePosixPath(path) for path in paths]
    for file in (file for base in (folder, *folder.parents[:2]) for file in sorted(base.glob("vgmidi*.csv"))):
        quadrants, games = _read_vgmidi(file)
        return [quadrants.get(name.stem) for name in names], [games.get(name.stem, str(name)) for name in names]
    matches = [re.match(r"(Q[1-4])_(.{11}(?=_\d+\.))?", name.name) for name in names]
    groups = [match and match[2] or path for match, path in zip(matches, paths, strict=True)]
    return [match and match[1] for match in matches], groups


def _read_vgmidi(file: Path) -> tuple[dict[str, str | None], dict[str, str]]:
    """Quadrant and game of each piece that VGMIDI's csv names, by file stem.

    Its rows are phrases (labelled/phrases/X_0.mid of the piece X.mid); a piece whose phrases disagree has no label.
    """
    quadrants, game = {}, {}
    try:
        for row in _read_csv(file):
            stem = re.sub(r"_\d+$", "", PurePosixPath(row["midi"]).stem)
            quadrant = QUADRANT[float(row["valence"]) > 0, float(row["arousal"]) > 0]
            quadrants[stem] = quadrant if quadrants.get(stem, quadrant) == quadrant else None
            game[stem] = row["game"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{file} is not VGMIDI's table: expected columns game, midi, valence, arousal") from None
    return quadrants, game


def _read_csv(file: Path) -> list[dict[str, str]]:
    """The rows by column, in lower case, of a file in UTF-8 or UTF-16, separated by commas, semicolons or tabs."""
    try:
        content = file.read_bytes()
        lines = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig").splitlines()
        if lines and lines[0].startswith("sep="):  # Excel's
            del lines[0]
        delimiter = max(",;\t", key=lines[0].count) if lines else ","
        table = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=delimiter)]
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error):
        raise ValueError(f"{file} is not a csv file in UTF-8") from None
    head = [name.lower() for name in table[0]] if table else []
    return [dict(zip(head, row, strict=False)) for row in table[1:] if any(row)]
