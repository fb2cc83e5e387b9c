"""Every setting: of a pre-training run (`Config`) and of a fine-tuning run (`Finetuning`), two frozen dataclasses.

`--config NAME` picks a preset of `Config`; every field is also a flag of its script (`mask_low` is `--mask-low`).
"""

import argparse
import math
from dataclasses import dataclass, field, fields

MOST_SEEDS = 1 << 31  # the seed of a step, an int64, has the run's above the 32 bits of the step


def _setting(default, help: str, choices: tuple[str, ...] = (), above: int | None = None, below: float = math.inf):
    return field(default=default, metadata={"help": help, "choices": choices, "above": above, "below": below})


@dataclass(frozen=True)
class Config:
    """Settings of model, objective and optimisation; see each field's help text.

    Raises ValueError, in one line, where a value cannot work.
    """

    encoding: str = _setting("octuple", "compound words", choices=("octuple", "cp", "midibert"))
    notes: int = _setting(1024, "L, notes per sequence", above=0)

    layers: int = _setting(12, "N, Transformer layers", above=0)
    width: int = _setting(768, "d, hidden size", above=0)
    heads: int = _setting(12, "H, attention heads (d/H at least 16)", above=0)
    reach: int = _setting(1024, "P, longest sequence that the distance tables cover", above=0)
    field_width: int = _setting(256, "e, embedding size of one field", above=0)
    dropout: float = _setting(0.1, "dropout on embeddings, residuals and heads", below=1)
    attention_dropout: float = _setting(0.1, "dropout on attention probabilities", below=1)

    objective: str = _setting("adversarial", "who chooses what to mask", choices=("adversarial", "random"))
    mask_low: float = _setting(0.1, "least share of a sequence's unfrozen notes to select or freeze")
    mask_high: float = _setting(0.3, "largest such share", below=1)
    mask_cap: float = _setting(
        0.15, "most notes to select, as a share of L; the share that random masking selects", below=1
    )
    masker_share: float = _setting(0.3, "share of the selected notes in each group of the masker's target")
    freeze_every: int = _setting(5, "epochs between updates of the mask book (0: never freeze)")
    unfreeze: float = _setting(0.1, "largest probability of unfreezing a note at an update", below=1)
    transpose: int = _setting(11, "largest random transposition in semitones (0: none)")

    batch: int = _setting(32, "B, sequences per step", above=0)
    epochs: int = _setting(500, "most epochs", above=0)
    epoch_size: int = _setting(0, "training sequences per epoch (0: one pass over the data)")
    lr: float = _setting(1e-4, "AdamW learning rate", above=0)
    warmup: int = _setting(0, "steps of linear warm-up")
    schedule: str = _setting("constant", "learning rate after warm-up", choices=("constant", "cosine"))
    weight_decay: float = _setting(0.01, "AdamW weight decay")
    clip: float = _setting(3.0, "largest gradient norm")
    patience: int = _setting(30, "stop after so many epochs without better validation accuracy or loss", above=0)
    valid_share: float = _setting(0.1, "share of the pieces held out for validation without a --split file", below=1)
    valid_size: int = _setting(0, "validation sequences, drawn once (0: all)")
    dtype: str = _setting("auto", "compute type; weights stay fp32", choices=("auto", "fp32", "bf16"))
    seed: int = _setting(0, "seed of everything random", below=MOST_SEEDS)

    def __post_init__(self):
        _check(self)
        if self.width % self.heads or self.width // self.heads < 16:
            raise ValueError(f"width {self.width} does not split into {self.heads} heads of at least 16")
        if self.notes > self.reach:
            raise ValueError(
                f"sequences of {self.notes} notes are longer than the reach of {self.reach}: raise --reach"
            )
        if self.mask_low > self.mask_high:
            raise ValueError(f"mask_low {self.mask_low} is above mask_high {self.mask_high}")
        if self.masker_share > 0.5:
            raise ValueError(f"masker_share is {self.masker_share}: its two groups must not overlap (at most 0.5)")


@dataclass(frozen=True)
class Finetuning:
    """Settings of mask fine-tuning. The model's own come with its checkpoint. Raises ValueError as `Config`."""

    mask: float = _setting(0.0, "share of the notes to hide while training, mask fine-tuning (0: none)", below=1)
    transpose: int = _setting(11, "largest random transposition in semitones while training (0: none)")
    notes: int = _setting(
        0, "L, notes per sequence (0: the --reach given, or as in pre-training; sequence tasks: 1024)"
    )
    reach: int = _setting(0, "P, how far notes attend, as far as in pre-training or further (0: as far)")
    train_layers: int = _setting(
        1_000,
        "topmost encoder layers to train (all, if there are fewer; sequence tasks with --init: 0, the head alone)",
    )
    class_weights: bool = _setting(False, "weigh classes by the inverse of their frequency")
    batch: int = _setting(8, "B, sequences per step (sequence tasks: 2)", above=0)
    epochs: int = _setting(10, "most epochs (5 on the demo corpus)", above=0)
    epoch_size: int = _setting(0, "training sequences per epoch (0: one pass over the data)")
    valid_size: int = _setting(0, "validation sequences to use after each epoch, drawn once (0: all)")
    lr: float = _setting(3e-4, "AdamW learning rate", above=0)
    warmup: int = _setting(50, "steps of linear warm-up")
    schedule: str = _setting("cosine", "learning rate after warm-up", choices=("constant", "cosine"))
    weight_decay: float = _setting(0.01, "AdamW weight decay")
    clip: float = _setting(3.0, "largest gradient norm")
    patience: int = _setting(5, "stop after so many epochs without better validation accuracy or loss", above=0)
    dtype: str = _setting("auto", "compute type; weights stay fp32", choices=("auto", "fp32", "bf16"))
    seed: int = _setting(0, "seed of everything random; also of the split where no file gives one", below=MOST_SEEDS)

    def __post_init__(self):
        _check(self)


def _check(settings) -> None:
    for f in fields(settings):
        value, rule, problem = getattr(settings, f.name), f.metadata, ""
        if rule["choices"]:
            problem = "" if value in rule["choices"] else f"choose one of {', '.join(rule['choices'])}"
        elif value < 0 or value == rule["above"]:
            problem = "it must be positive"
        elif value >= rule["below"]:
            problem = f"it must be below {rule['below']}"
        if problem:
            raise ValueError(f"{f.name} is {value!r}: {problem}")


PRESETS = {
    # for the tests: seconds on any machine
    "tiny": dict(
        notes=64, layers=2, width=64, heads=2, reach=64, field_width=16,
        batch=4, epochs=3, lr=1e-3, warmup=10, schedule="cosine", freeze_every=1,
    ),
    # for a laptop's CPU: 3.9 M parameters; the demo run takes minutes
    "small": dict(
        notes=256, layers=4, width=256, heads=4, reach=256, field_width=64, attention_dropout=0.0,
        batch=4, epochs=4, lr=1e-3, warmup=50, schedule="cosine", freeze_every=2,
    ),
    # the paper: 12 x 768, 12 heads, 1,024 notes
    "base": {},
}  # fmt: skip


# `finetune.py --paper`: from the paper's text, or else its code
PAPER_FINETUNING = dict(mask=0.12, notes=1024, batch=8, lr=2e-5, warmup=0, schedule="constant", patience=10)


def positive(text: str) -> int:
    """An argument that is a whole number of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)


def add_flags(parser: argparse.ArgumentParser, settings: type, title: str) -> None:
    """Give the parser one flag per field of `Config` or `Finetuning`; a flag that is not given is None."""
    group = parser.add_argument_group(title)
    name, preset = ("small", PRESETS["small"]) if settings is Config else ("paper", PAPER_FINETUNING)
    for f in fields(settings):
        flag, about = "--" + f.name.replace("_", "-"), f.metadata["help"]
        if f.type is bool:
            group.add_argument(flag, action="store_const", const=True, help=about)
            continue
        special = f"; {name}: {preset[f.name]}" if f.name in preset else ""
        about += f" (default: {f.default}{special})"
        group.add_argument(flag, type=f.type, choices=f.metadata["choices"] or None, help=about)


def flags_given(args: argparse.Namespace, settings: type) -> dict:
    """The fields of `Config` or `Finetuning` that the command line gives."""
    values = {f.name: getattr(args, f.name) for f in fields(settings)}
    return {name: value for name, value in values.items() if value is not None}
