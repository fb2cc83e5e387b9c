"""Checkpoints: one file of plain tensors, numbers and strings; written whole or not at all, loaded as data alone.

{"format": FORMAT, "version": 1, "config": {...}, "fields": [[name, values, size], ...], "model": {...}, ...}
"""

import pickle
import struct
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from amb.config import Config
from amb.files import writing

SHIPPED = Path(__file__).parent / "weights"  # models that come with the code: small/model.pt is called `small`
DAMAGED = (  # what torch, numpy, zipfile and struct raise over files that are cut short or something else
    RuntimeError, ValueError, EOFError, LookupError, AttributeError, TypeError,
    zipfile.BadZipFile, zlib.error, struct.error,
)  # fmt: skip
FORMAT, VERSION = "adversarial-midibert checkpoint", 1
MODEL = "kind", "config", "fields", "task", "classes", "notes"  # what describes a model beside its weights


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one line and names the file."""


def save(path: Path, content: dict) -> None:
    """Write beside `path`, flush to the disk, then rename: `path` is always a whole file, old or new."""
    with writing(path) as file:
        torch.save({"format": FORMAT, "version": VERSION, **content}, file)


def copy(source: Path, path: Path) -> None:
    """A copy of a checkpoint, whole or not at all."""
    with writing(path) as file:
        file.write(source.read_bytes())


def halve(source: Path, out: Path) -> None:
    """A checkpoint without what only training needs, its weights in half precision: to share.

    Raises CheckpointError where a weight is beyond half precision, and as `load`.
    """
    content = load(source)
    weights = weights_of(content, "", source)
    weights = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
    if beyond := [name for name, value in weights.items() if not value.isfinite().all()]:
        raise CheckpointError(f"{source}: {beyond[0]} has values that half precision does not hold")
    save(out, {**{key: content[key] for key in MODEL if key in content}, "model": weights})


def save_arrays(path: Path, **arrays) -> None:
    """Arrays into an .npz, whole or not at all."""
    with writing(path) as file:
        np.savez_compressed(file, **arrays)


def find(name: str | Path) -> Path:
    """A checkpoint file, or the one to use of a run folder: model.pt or best.pt. Raises CheckpointError without one.

    Where there is no such path, the model of that name that comes with the code: `small`.
    """
    path = Path(name)
    if not path.exists() and path == Path(path.name) and (SHIPPED / path).is_dir():
        path = SHIPPED / path
    if not path.exists():
        shipped = ", ".join(folder.name for folder in SHIPPED.iterdir())
        raise CheckpointError(f"{name} does not exist; a model that comes with the code is called {shipped}")
    if not path.is_dir():
        return path
    for candidate in (path / "model.pt", path / "best.pt"):
        if candidate.is_file():
            return candidate
    raise CheckpointError(f"{path} holds neither model.pt nor best.pt: is it a finished run?")


@contextmanager
def reading(path: Path):
    """Errors of the block, which reads arrays from `path` as data, become CheckpointErrors."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except pickle.UnpicklingError:
        raise CheckpointError(f"{path} is damaged, or holds more than weights; it was not loaded") from None
    except DAMAGED:
        raise CheckpointError(f"{path} is damaged or not a checkpoint") from None


def load(path: Path, device: torch.device | str = "cpu") -> dict:
    """Read a checkpoint. Raises CheckpointError if it is missing, damaged, hostile or something else."""
    with reading(path):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():  # torch.load does not compare the weights' checksums
                    raise zipfile.BadZipFile(damaged)
        content = torch.load(path, map_location=device, weights_only=True)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this program")
    if content.get("version") != VERSION:
        raise CheckpointError(f"{path} is of format version {content.get('version')!r}; this code reads {VERSION}")
    return content


def config_of(content: dict, path: Path) -> Config:
    """The model's settings in a checkpoint. Raises CheckpointError where there are none that work."""
    try:
        return Config(**content["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has no usable settings of a model: {error}") from None


def weights_of(content: dict, start: str, path: Path) -> dict[str, torch.Tensor]:
    """The weights whose names begin with `start`, by the rest of the name. Raises CheckpointError if it holds none."""
    model = content.get("model")
    if not isinstance(model, dict) or not all(isinstance(value, torch.Tensor) for value in model.values()):
        raise CheckpointError(f"{path} holds no weights")
    return {name[len(start) :]: value for name, value in model.items() if name.startswith(start)}


def load_weights(module: torch.nn.Module, state: dict, path: Path) -> None:
    """`load_state_dict`, with a CheckpointError that names the first weight that does not fit."""
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    for name in expected | shapes:
        shape, of_model = shapes.get(name, "missing"), expected.get(name, "none")
        if shape != of_model:
            raise CheckpointError(f"{path} is of another shape: {name} is {shape}, this model has {of_model}")
    module.load_state_dict(state)


def load_encoder(encoder: torch.nn.Module, content: dict, path: Path) -> None:
    """The encoder's weights of a checkpoint of any kind. Raises CheckpointError as `load_weights` and `config_of`.

    An encoder of a longer reach takes what is learned of the outermost distances for all that lie beyond.
    """
    state = weights_of(content, "encoder.", path)
    beyond = encoder.reach - config_of(content, path).reach
    with reading(path):
        for name in (name for name in state if name.endswith(".distance") and beyond > 0):
            first, last = (row.expand(beyond, -1) for row in (state[name][:1], state[name][-1:]))
            state[name] = torch.cat([first, state[name], last])
    load_weights(encoder, state, path)
