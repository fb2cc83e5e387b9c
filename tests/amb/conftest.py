"""Small corpora for the tests of amb/ and train.py."""

import pytest

import tokenizer
from amb import demo


@pytest.fixture(scope="session")
def midi_folder(tmp_path_factory):
    """16 demo pieces as MIDI."""
    return demo.write_corpus(tmp_path_factory.mktemp("demo") / "midi", pieces=16)


@pytest.fixture(scope="session")
def store(midi_folder, tmp_path_factory):
    """The same, tokenized as octuple words."""
    path = tmp_path_factory.mktemp("store") / "octuple"
    tokenizer.build_store([midi_folder], path, workers=1, progress=False)
    return tokenizer.open_store(path)
