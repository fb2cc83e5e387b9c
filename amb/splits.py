"""Which pieces train, which validate, which test: published lists, or a fair draw. Always whole pieces.

A split file is JSON, {"train": [...], "valid": [...], "test": [...]}, of file names or of paths' last parts.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from amb import tokenizer

ROLES = ("train", "valid", "test")


def assign_roles(
    stores: list[tokenizer.Store], splits: Iterable[str | Path], valid_share: float, seed: int
) -> list[list[str]]:
    """For pre-training: a role for each piece of each store: "train", "valid", "test" or "unused".

    A piece that no list of `splits` names is unused. Without lists, `valid_share` of the songs (at least one) validate,
    in all their versions.

    Raises ValueError, naming the file, for a split that cannot be read, names nothing, or contradicts itself.
    """
    names = read_splits(splits)
    if names:
        roles = [[role_of(piece.path, names) for piece in store.pieces] for store in stores]
    else:
        songs = [[(number, song(piece.path)) for piece in store.pieces] for number, store in enumerate(stores)]
        different = list(dict.fromkeys(one for of_store in songs for one in of_store))
        count = max(1, round(valid_share * len(different)))
        held_out = {different[number] for number in np.random.default_rng(seed).permutation(len(different))[:count]}
        roles = [["valid" if one in held_out else "train" for one in of_store] for of_store in songs]
    for role in ("train", "valid"):
        if not any(role in of_store for of_store in roles):
            raise ValueError(f"no piece is left to {role} on: give more data, or another split")
    return roles


def read_splits(paths: Iterable[str | Path]) -> dict[str, str]:
    """The role of every name in the split files. Raises ValueError as `assign_roles`."""
    names = {}
    for path in map(Path, paths):
        for role, entries in _read_split(path).items():
            for name in entries:
                if names.setdefault(name, role) != role:
                    raise ValueError(f"{path} gives {name} to both {names[name]} and {role}")
    return names


def _read_split(path: Path) -> dict[str, list[str]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is not JSON") from None
    lists = {role: content.get(role, []) for role in ROLES} if isinstance(content, dict) else {}
    if not any(lists.values()) or not all(isinstance(names, list) for names in lists.values()):
        raise ValueError(f'{path} is not a split: expected {{"train": [...], "valid": [...], "test": [...]}}')
    return {role: [str(PurePosixPath(str(name))) for name in names] for role, names in lists.items()}


def endings(path: str) -> list[str]:
    """`a/b/c.mid` -> `a/b/c.mid`, `b/c.mid`, `c.mid`."""
    parts = PurePosixPath(path).parts
    return ["/".join(parts[start:]) for start in range(len(parts))]


def role_of(path: str, names: dict[str, str]) -> str:
    """The role of the longest ending of `path`, in whole parts, that a split names; "unused" if none does."""
    return next((names[ending] for ending in endings(path) if ending in names), "unused")


def song(path: str) -> str:
    """POP909's song: NNN/NNN.mid and NNN/versions/NNN-v1.mid are one; any other file is its own."""
    parts = PurePosixPath(path).parts
    if "versions" in parts:
        return "/".join(parts[: parts.index("versions")])
    return "/".join(parts[:-1]) if len(parts) > 1 and parts[-2] == PurePosixPath(path).stem else path


def labelled_roles(labelled, split: Path | None, seed: int) -> tuple[list[str], list[str]]:
    """For fine-tuning: a role for each piece of `labelled` (`tasks.Labelled`), and the split's names that no piece has.

    Pieces without a label are unused. Raises ValueError, naming the file, as `read_splits` and `draw` do, and where
    nothing is left for one of the three roles.
    """
    paths, absent = [piece.path for piece in labelled.store.pieces], []
    if split is None:
        roles = draw(labelled.of_piece, labelled.groups, labelled.classes, seed)
    else:
        names = read_splits([split])
        labelled_paths = zip(paths, labelled.of_piece, strict=True)
        roles = [role_of(path, names) if label >= 0 else "unused" for path, label in labelled_paths]
        absent = sorted(set(names) - {ending for path in paths for ending in endings(path)})
    for role, verb in zip(ROLES, ("train", "validate", "test"), strict=True):
        if role not in roles:
            raise ValueError(f"{split or 'a draw from so few'} leaves no labelled piece to {verb} on")
    return roles, absent


def draw(labels: np.ndarray, groups: Sequence[str], classes: Sequence[str], seed: int, share: float = 0.1) -> list[str]:
    """For fine-tuning without a split file: a role for each piece, `share` of each class to test, as much to validate.

    labels int [pieces], -1 for pieces without one (unused); pieces of one group (one game, one recording) stay
    together and count for the group's commonest class. A class of two groups gets no validation piece.
    Raises ValueError for a class that has one piece, or pieces of one group, only.
    """
    members: dict[str, list[int]] = {}
    for number in np.random.default_rng(seed).permutation(len(labels)).tolist():
        if labels[number] >= 0:
            members.setdefault(groups[number], []).append(number)
    queues: dict[int, list[list[int]]] = {}
    for pieces in members.values():
        queues.setdefault(Counter(labels[pieces].tolist()).most_common(1)[0][0], []).append(pieces)
    roles = ["unused"] * len(labels)
    for label in range(len(classes)):
        own = [group for group, of in zip(groups, labels, strict=True) if of == label]
        if own and len(set(own)) < 2:
            what = "one piece" if len(own) == 1 else f"{len(own)} pieces, all of one group"
            raise ValueError(f"class {classes[label]!r} has {what}: it cannot be both learned and tested")
    for _, queue in sorted(queues.items()):
        want = max(1, round(share * sum(map(len, queue))))
        for role in ("test", "valid", "train"):
            taken = 0
            while queue and (role == "train" or (taken < want and len(queue) > 1)):
                pieces = queue.pop()
                taken += len(pieces)
                for piece in pieces:
                    roles[piece] = role
    return roles


def seen_before(paths: Iterable[str], pieces: dict[str, list[str]]) -> dict[str, list[str]]:
    """Which of these files a pre-training run used, by the role they had there: {"train": [...], ...}.

    `pieces` is the run's pieces.json. Paths of one file may begin at different folders: folder and name must agree, or
    the name alone where one of the two paths has no folder.
    """
    used = [(path, role) for role in ROLES for path in pieces.get(role, ())]
    tails = {endings(path)[-2:][0]: role for path, role in used}
    names = {endings(path)[-1]: role for path, role in used}
    found = {role: [] for role in ROLES}
    for path in paths:
        role = role_of(path, tails if "/" in path else names)
        if role != "unused":
            found[role].append(path)
    return found


def seen_by(checkpoint: Path | None, pieces: dict[str, list[str]]) -> dict | None:
    """What the pre-training run of this checkpoint did with the pieces now used, or None if that is not known.

    {"train": {"test": [...]}, ...}: trained on there, tested on here; by role there, then by role here.
    """
    try:
        before = json.loads((checkpoint.parent / "pieces.json").read_text()) if checkpoint else {}
    except (OSError, ValueError):
        return None
    seen = {role: seen_before(pieces[role], before) for role in ROLES}
    return {there: {here: seen[here][there] for here in ROLES} for there in ROLES}


def doubts(absent: list[str], seen: dict | None, pretrained: bool) -> list[str]:
    """What a reader of the results should know, in sentences."""
    lines = []
    if absent:
        lines.append(f"{len(absent)} names of the split or csv are not among the usable files, {absent[0]} for one")
    if pretrained and seen is None:
        lines.append("which pieces the pre-training saw is not known: no pieces.json beside the checkpoint")
    for there, here in (("train", "test"), ("train", "valid"), ("valid", "train"), ("test", "train")):
        if seen and seen[there][here]:
            count, verb = len(seen[there][here]), {"train": "trained", "valid": "validated", "test": "tested"}
            lines.append(
                f"pre-training {verb[there]} on {count} pieces that now {here}, {seen[there][here][0]} for one"
            )
    return lines
