"""Which pieces train, which validate, which test: published lists, or a fair draw. Always whole pieces.

A split file is JSON, {"train": [...], "valid": [...], "test": [...]}, of file names or of paths' last parts.
"""

import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from amb import tokenizer

ROLES = {"train": "train", "valid": "validate", "test": "test"}  # with their verbs
SYNONYMS = {"validation": "valid", "val": "valid", "dev": "valid", "training": "train", "testing": "test"}
SUFFIX = re.compile(r"\.(midi?|kar|rmi)$", re.IGNORECASE)


def assign_roles(
    stores: list[tokenizer.Store], files: Sequence[str | Path], valid_share: float, seed: int
) -> tuple[list[list[str]], list[str]]:
    """For pre-training: a role for each piece of each store, and remarks, sentences for the reader of the results.

    By the split `files`; without any, `valid_share` of the pieces (at least one) validate, and versions of one song
    stay together. Raises ValueError as `assigned`.
    """
    pieces = [(number, piece.path) for number, store in enumerate(stores) for piece in store.pieces]
    groups = [(number, song(path)) for number, path in pieces]
    roles, absent, remarks = assigned([path for _, path in pieces], groups, files, {"valid": valid_share}, seed)
    rest = iter(roles)
    return [[next(rest) for _ in store.pieces] for store in stores], doubts(absent, None, False) + remarks


def assigned(
    paths: Sequence[str],
    groups: Sequence,
    files: Sequence[str | Path],
    shares: dict[str, float],
    seed: int,
    labels: np.ndarray | None = None,
) -> tuple[list[str], list[str], list[str]]:
    """A role for each piece, by split files or drawn (see `draw`); the files' names that no piece has; and remarks.

    Where the files leave no validation pieces, a share of the training pieces validate. The role of a piece that
    is not named, or has no label, is "unused". Raises ValueError as `roles_of`, and where nothing is left for a role.
    """
    absent, remarks = [], []
    if files:
        roles, absent = roles_of(paths, files)
        if labels is not None:
            roles = [role if label >= 0 else "unused" for role, label in zip(roles, labels, strict=True)]
        if "valid" not in roles:
            training = np.where(np.array(roles) == "train", 0 if labels is None else labels, -1)
            drawn = draw(groups, {"valid": shares["valid"]}, seed, training)
            roles = ["valid" if new == "valid" else old for new, old in zip(drawn, roles, strict=True)]
            remarks = [f"{files[0]} has no validation part: {roles.count('valid')} of its training pieces validate"]
    else:
        roles = draw(groups, shares, seed, labels)
    for role in ("train", *shares):
        if role not in roles:
            where = f"{files[0] if files else 'a draw from so few'} leaves no {'labelled ' * (labels is not None)}piece"
            raise ValueError(f"{where} to {ROLES[role]} on")
    return roles, absent, remarks


def read_splits(paths: Iterable[str | Path]) -> dict[str, str]:
    """The role of every name in the split files.

    Raises ValueError, naming the file, for one that cannot be read, names nothing, or contradicts itself or another.
    """
    names = {}
    for path in paths:
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError):
            raise ValueError(f"{path} is not JSON") from None
        content = {SYNONYMS.get(key, key): names for key, names in content.items()} if isinstance(content, dict) else {}
        lists = [content.get(role, []) for role in ROLES]
        if not any(lists) or not all(isinstance(entries, list) for entries in lists):
            raise ValueError(f'{path} is not a split: expected {{"train": [...], "valid": [...], "test": [...]}}')
        for role, entries in zip(ROLES, lists, strict=True):
            for name in (parts[0] for entry in entries if (parts := endings(str(entry)))):
                if names.setdefault(name, role) != role:
                    raise ValueError(f"{path} gives {name} to both {names[name]} and {role}")
    return names


def matches(paths: Iterable[str], names: Iterable[str]) -> list[str | None]:
    """For each path the one of `names` that stands for it: that whose end agrees with its end in most parts.

    A name may lack its suffix, have backslashes, be of another Unicode normal form, and begin further up than the paths
    (`/home/me/data/a/b.mid` for `a/b.mid`) or further down (`b.mid`).
    """
    by_name, by_ending = {}, {}
    for name in names:
        first, *others = endings(name)
        by_name[first] = name
        for ending in others:
            by_ending[ending] = None if ending in by_ending else name  # what two names end with stands for neither
    stand = []
    for path in paths:
        keys = [key for ending in endings(path) for key in (ending, SUFFIX.sub("", ending))]
        candidates = [table.get(key) for table in (by_name, by_ending) for key in keys[:2]]
        candidates += [by_name.get(key) for key in keys[2:]]
        stand.append(next(filter(None, candidates), None))
    return stand


def roles_of(paths: Sequence[str], files: Iterable[str | Path]) -> tuple[list[str], list[str]]:
    """The role of each path by these split files, "unused" if they do not name it; and the names that no path has.

    Raises ValueError as `read_splits`, and where no name matches a path.
    """
    files, names = list(files), read_splits(files)
    stand = matches(paths, names)
    absent = sorted(set(names) - set(stand))
    if len(absent) == len(names):
        raise ValueError(f"{files[0]}: none of its {len(absent)} names is that of a usable file, {absent[0]} for one")
    return [names[name] if name else "unused" for name in stand], absent


def endings(path: str) -> list[str]:
    """`a/b/c.mid` -> `a/b/c.mid`, `b/c.mid`, `c.mid`; with slashes, in normal form C."""
    parts = PurePosixPath(unicodedata.normalize("NFC", path).strip().replace("\\", "/").lstrip("/")).parts
    return ["/".join(parts[start:]) for start in range(len(parts))]


def song(path: str) -> str:
    """POP909's song: NNN/NNN.mid and NNN/versions/NNN-v1.mid are one; any other file is its own."""
    parts = PurePosixPath(path).parts
    if "versions" in parts:
        return "/".join(parts[: parts.index("versions")])
    return "/".join(parts[:-1]) if len(parts) > 1 and parts[-2] == PurePosixPath(path).stem else path


def labelled_roles(labelled, split: Path | None, seed: int) -> tuple[list[str], list[str], list[str]]:
    """For fine-tuning, `assigned` for the pieces of `labelled` (`tasks.Labelled`), a tenth to validate, one to test.

    Raises ValueError, in a draw, also for a class that has one piece, or pieces of one group, only.
    """
    paths, labels, groups = [piece.path for piece in labelled.store.pieces], labelled.of_piece, labelled.groups
    for label, name in enumerate(() if split else labelled.classes):
        of_class = np.array(groups)[labels == label].tolist()
        if len(set(of_class)) == 1:
            what = "one piece" if len(of_class) == 1 else f"{len(of_class)} pieces, all of one group"
            raise ValueError(f"class {name!r} has {what}: it cannot be both learned and tested")
    shares = {"test": 0.1, "valid": 0.1}
    return assigned(paths, groups, [split] if split else [], shares, seed, labels)


def draw(groups: Sequence, shares: dict[str, float], seed: int, labels: np.ndarray | None = None) -> list[str]:
    """A role for each piece: of each class, the `shares` of its pieces (at least one), the rest to train.

    labels int [pieces], -1 for pieces without one (unused); without labels, all are of one class. Pieces of one group
    (one song, game, recording) stay together and count for the group's commonest class. The last group of a class
    always trains.
    """
    order = np.random.default_rng(seed).permutation(len(groups)).tolist()
    if labels is None:
        labels, order = np.zeros(len(groups), int), order[::-1]  # the order that pre-trainings have always had
    members, queues = defaultdict(list), defaultdict(list)
    for number in order:
        if labels[number] >= 0:
            members[groups[number]].append(number)
    for pieces in members.values():
        queues[Counter(labels[pieces].tolist()).most_common(1)[0][0]].append(pieces)
    roles = np.where(labels >= 0, "train", "unused").tolist()
    for queue in queues.values():
        pieces_of_class = sum(map(len, queue))
        for role, share in shares.items():
            missing = max(1, round(share * pieces_of_class))
            while missing > 0 and len(queue) > 1:
                pieces = queue.pop()
                missing -= len(pieces)
                for piece in pieces:
                    roles[piece] = role
    return roles


def seen_by(checkpoint: Path | None, pieces: dict[str, list[str]]) -> dict | None:
    """What the pre-training run of this checkpoint did with the pieces now used, or None if that is not known.

    {"train": {"test": [...]}, ...}: trained on there, tested on here; by role there, then by role here. Of two paths
    the folder and the name must agree, or the name alone if one has no folder and only one has this name.
    """
    try:
        before = json.loads((checkpoint.parent / "pieces.json").read_text()) if checkpoint else {}
    except (OSError, ValueError):
        return None
    role_of = {endings(path)[-2:][0]: role for role in ROLES for path in before.get(role, ())}
    seen = {there: {here: [] for here in ROLES} for there in ROLES}
    for here in ROLES:
        for path, name in zip(pieces[here], matches(pieces[here], role_of), strict=True):
            if name:
                seen[role_of[name]][here].append(path)
    return seen


def doubts(absent: list[str], seen: dict | None, pretrained: bool) -> list[str]:
    """What a reader of the results should know, in sentences."""
    lines = []
    if absent:
        examples = ", ".join(absent[:3]) + (" …" if len(absent) > 3 else "")
        lines.append(f"names in the split or csv that match no usable file: {len(absent)} ({examples})")
    if pretrained and seen is None:
        lines.append("the pieces of the pre-training are not known: no pieces.json beside the checkpoint")
    verbs = {"train": "trained", "valid": "validated", "test": "tested"}
    for there, here in (("train", "test"), ("train", "valid"), ("valid", "train"), ("test", "train")):
        if pieces := (seen or {}).get(there, {}).get(here):
            lines.append(f"pre-training {verbs[there]} on {len(pieces)} pieces that now {here}, {pieces[0]} for one")
    return lines
