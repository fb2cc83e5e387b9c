"""Presets, flags and what a configuration refuses."""

import argparse
from dataclasses import asdict

import pytest

from amb.config import PRESETS, Config, add_flags, flags_given


def parse(*flags):
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", choices=PRESETS, default="small")
    add_flags(parser, Config, "settings")
    args = parser.parse_args(flags)
    return Config(**PRESETS[args.config] | flags_given(args, Config))


def test_presets_and_flags():
    assert parse("--config", "base") == Config()
    assert parse() == Config(**PRESETS["small"])
    assert Config(**asdict(parse())) == parse()
    changed = {"lr": 0.5, "objective": "random", "mask_low": 0.2}
    every = asdict(Config(**PRESETS["tiny"] | changed))
    flags = [word for name, value in every.items() for word in ("--" + name.replace("_", "-"), str(value))]
    assert parse("--config", "base", *flags) == Config(**every)


@pytest.mark.parametrize(
    "changes",
    [
        {"notes": 2000}, {"width": 100}, {"heads": 64}, {"dropout": 1.0}, {"mask_low": 0.4}, {"objective": "none"},
        {"batch": 0}, {"lr": -1.0}, {"masker_share": 0.6}, {"encoding": "remi"}, {"epochs": -3},
    ],
)  # fmt: skip
def test_values_that_cannot_work_are_one_line(changes):
    with pytest.raises(ValueError, match=next(iter(changes)).split("_")[0]) as error:
        Config(**changes)
    assert "\n" not in str(error.value)
