"""Small corpora for the tests of amb/ and train.py."""

from dataclasses import asdict

import pytest
import torch

from amb import checkpoint, demo, tasks, tokenizer
from amb.config import PRESETS, Config
from amb.model import AdversarialMidiBert, Classifier


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


@pytest.fixture(scope="session")
def save_model():
    """Write the checkpoint of a tiny model with random weights, large enough to give every input its own answer."""

    def save_model(path, task=None, encoding="octuple", notes=48, changes=None):
        config = Config(**PRESETS["tiny"] | (changes or {}), encoding=encoding)
        fields = tokenizer.load(encoding).fields
        sizes = tuple(field.size for field in fields)
        torch.manual_seed(0)
        content = {"config": asdict(config), "fields": [[f.name, f.values, f.size] for f in fields]}
        if task:
            classes = list(tasks.TASKS[task].classes or ("Bach", "Satie", "Weill"))
            model = Classifier(config, sizes, tasks.TASKS[task].level, len(classes))
            content |= {"kind": "finetune", "task": task, "classes": classes, "notes": notes, "settings": {}}
            for parameter in model.head.parameters():
                parameter.data *= 10
        else:
            model = AdversarialMidiBert(config, sizes)
            content |= {"kind": "pretrain"}
        checkpoint.save(path, content | {"model": model.state_dict()})
        return path

    return save_model
