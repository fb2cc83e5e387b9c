"""Checkpoints: one file of plain tensors, numbers and strings; written whole or not at all, loaded without running it.

{"format": FORMAT, "version": 1, "config": {...}, "fields": [[name, values, size], ...], "model": {...}, ...}
"""

import os
import pickle
import zipfile
from pathlib import Path

import torch

FORMAT, VERSION = "adversarial-midibert checkpoint", 1


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one line and names the file."""


def save(path: Path, content: dict) -> None:
    """Write beside `path`, flush to the disk, then rename: whatever happens, `path` is a whole file, old or new."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            torch.save({"format": FORMAT, "version": VERSION, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def load(path: Path, device: torch.device | str = "cpu") -> dict:
    """Read a checkpoint. Raises CheckpointError if it is missing, damaged, hostile or something else."""
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except pickle.UnpicklingError:
        raise CheckpointError(f"{path} is damaged, or holds more than weights; it was not loaded") from None
    except (RuntimeError, ValueError, EOFError, KeyError, IndexError, AttributeError, TypeError, zipfile.BadZipFile):
        raise CheckpointError(f"{path} is damaged or not a checkpoint") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this program")
    if content.get("version") != VERSION:
        raise CheckpointError(f"{path} is of format version {content.get('version')!r}; this code reads {VERSION}")
    return content


def load_weights(module: torch.nn.Module, state: dict, path: Path) -> None:
    """`load_state_dict`, with a CheckpointError that names the first weight that does not fit."""
    expected = module.state_dict()
    for name in [*expected, *(name for name in state if name not in expected)]:
        have = tuple(state[name].shape) if name in state else "missing"
        want = tuple(expected[name].shape) if name in expected else "none"
        if have != want:
            raise CheckpointError(f"{path} is of another shape: {name} is {have}, this model has {want}")
    module.load_state_dict(state)
