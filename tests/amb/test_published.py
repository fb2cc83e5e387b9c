"""Converted weights compute what Hugging Face's BertModel computes with them, and come back unchanged to the bit."""

import math
import os
import pickle
import sys
from dataclasses import asdict
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from amb import checkpoint, tokenizer
from amb.checkpoint import CheckpointError
from amb.config import PRESETS, Config
from amb.model import AdversarialMidiBert, Classifier, Encoder
from amb.published import convert, describe, export

transformers = pytest.importorskip("transformers")
WIDTH, FIELD_WIDTH, REACH = 32, 8, 24
SIZES = {"octuple": (262, 134, 135, 262, 134, 38, 260, 55), "midibert": (4, 18, 88, 66)}
DISTANCE = "bert.encoder.layer.1.attention.self.distance_embedding.weight"
BOTH = pytest.mark.parametrize("encoding", ["octuple", "midibert"])


class MidiBert(nn.Module):
    """The published encoder's module tree: names, shapes and forward pass."""

    def __init__(self, encoding: str, width=WIDTH, field_width=FIELD_WIDTH, reach=REACH, layers=2, heads=2, words=20):
        super().__init__()
        sizes, joined = SIZES[encoding], len(SIZES[encoding]) * field_width
        self.bert = transformers.BertModel(
            transformers.BertConfig(
                vocab_size=words,
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                intermediate_size=4 * width,
                max_position_embeddings=reach,
                position_embedding_type="relative_key_query",
                attn_implementation="eager",
            )
        )
        self.word_emb = nn.ModuleList(nn.ModuleDict({"lut": nn.Embedding(size, field_width)}) for size in sizes)
        self.in_linear = nn.Linear(joined, width)
        if encoding == "octuple":
            half = [nn.Linear(*ends) for ends in pairwise((joined, joined // 2, joined // 2, joined))]
            self.attention_linear = nn.Sequential(half[0], nn.ReLU(), half[1], nn.ReLU(), half[2], nn.Sigmoid())

    def forward(self, words: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        parts = [table["lut"](words[..., f]) for f, table in enumerate(self.word_emb)]
        parts = [part * math.sqrt(part.shape[-1]) for part in parts]
        embedded = self.in_linear(torch.cat(parts, -1))
        return self.bert(inputs_embeds=embedded, attention_mask=valid.float()).last_hidden_state


class MidiBertLM(nn.Module):
    """The published recoverer around it; with `masker`, the published masker's layers too."""

    def __init__(self, encoding: str, masker: bool = False):
        super().__init__()
        self.midibert = MidiBert(encoding)
        self.mask_lm = nn.ModuleDict({"proj": nn.ModuleList(nn.Linear(WIDTH, size) for size in SIZES[encoding])})
        if masker:
            self.linear = nn.Sequential(
                nn.Dropout(0.1), nn.Linear(WIDTH, 256), nn.ReLU(), nn.Linear(256, 1), nn.Sigmoid()
            )


def shaken(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter away from its start: a zero bias or a LayerNorm of ones would hide a mistake."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + ("LayerNorm.weight" in name))
    return module.eval()


def written(state, path):
    torch.save(state, path)
    return path


def loaded_encoder(path) -> Encoder:
    content = checkpoint.load(path)
    config = checkpoint.config_of(content, path)
    encoder = Encoder(config, tuple(size for _, _, size in content["fields"]))
    checkpoint.load_encoder(encoder, content, path)
    return encoder.eval()


def assert_same_tensors(state, expected):
    assert set(state) == set(expected)
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name


def same_hidden_states(theirs: MidiBert, ours: Encoder, words: torch.Tensor, lengths: torch.Tensor) -> float:
    valid = torch.arange(words.shape[1]) < lengths[:, None]
    with torch.no_grad():
        return (ours(words, lengths)[valid] - theirs(words, valid)[valid]).abs().max().item()


@BOTH
def test_a_converted_encoder_equals_hugging_face(encoding, midi_folder, tmp_path):
    theirs = shaken(MidiBert(encoding))
    convert(written(theirs.state_dict(), tmp_path / "published.pth"), tmp_path / "ours.pt")
    ours = loaded_encoder(tmp_path / "ours.pt")
    for length in (REACH, 7, 1):
        words = torch.stack([torch.randint(size, (3, length)) for size in SIZES[encoding]], -1)
        assert same_hidden_states(theirs, ours, words, torch.tensor([length, max(1, length // 2), 1])) < 1e-5
    files = sorted(midi_folder.rglob("*.mid"))[:3]
    pieces = [tokenizer.load(encoding).encode(file)[:REACH] for file in files]
    words = torch.from_numpy(np.stack([*pieces, np.roll(pieces[0], 9, axis=0)]).astype(np.int64))
    lengths = torch.tensor([REACH, 17, 5, REACH])
    pad = torch.from_numpy(tokenizer.load(encoding).pad.astype(np.int64))
    words[torch.arange(REACH) >= lengths[:, None]] = pad
    assert same_hidden_states(theirs, ours, words, lengths) < 1e-5


def test_a_converted_recoverer_equals_the_published_one(tmp_path):
    theirs = shaken(MidiBertLM("octuple", masker=True))
    convert(written(theirs.state_dict(), tmp_path / "published.pth"), tmp_path / "ours.pt")
    content = checkpoint.load(tmp_path / "ours.pt")
    ours = AdversarialMidiBert(Config(**content["config"]), SIZES["octuple"]).eval()
    checkpoint.load_weights(ours, content["model"], tmp_path / "ours.pt")
    hidden = torch.randn(2, 5, WIDTH)
    for logits, layer in zip(ours.recoverer(hidden), theirs.mask_lm["proj"], strict=True):
        torch.testing.assert_close(logits, layer(hidden))
    torch.testing.assert_close(ours.masker(hidden), theirs.linear(hidden).squeeze(-1))


@BOTH
def test_settings_are_read_off_the_shapes(encoding, tmp_path):
    theirs = MidiBert(encoding, width=64, field_width=12, reach=40, layers=3, heads=4)
    convert(written(theirs.state_dict(), tmp_path / "published.pth"), tmp_path / "ours.pt")
    content = checkpoint.load(tmp_path / "ours.pt")
    objective = {"octuple": "adversarial", "midibert": "random"}[encoding]
    expected = dict(encoding=encoding, layers=3, width=64, heads=4, reach=40, notes=40, field_width=12)
    assert content["kind"] == "pretrain"
    assert Config(**content["config"]) == Config(**expected, objective=objective)
    fields = tokenizer.load(encoding).fields
    assert content["fields"] == [[field.name, field.values, field.size] for field in fields]


def prefixed(state: dict, prefix: str) -> dict:
    return {prefix + name: tensor for name, tensor in state.items()}


def training_checkpoint(state: dict) -> dict:
    """As MidiBERT-Piano's trainer writes it."""
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    return {
        "epoch": 12,
        "state_dict": state,
        "best_acc": 0.7,
        "valid_acc": [0.5, 0.25],
        "valid_loss": 1.5,
        "train_loss": 3.0,
        "optimizer": optimizer.state_dict(),
    }


@BOTH
@pytest.mark.parametrize("prefix", ["", "module.", "midibert.", "module.midibert.", "model."])
def test_round_trips_are_exact_under_every_prefix(encoding, prefix, tmp_path):
    model = shaken(MidiBert(encoding) if "midibert" not in prefix else MidiBertLM(encoding))
    published = prefixed(model.state_dict(), prefix.removesuffix("midibert."))
    published[prefix + "bert.embeddings.position_ids"] = torch.arange(REACH)[None]  # transformers before 4.31
    if "midibert" in prefix:
        published[prefix.removesuffix("midibert.") + "classifier.1.weight"] = torch.randn(3, WIDTH)
    convert(written(published, tmp_path / "published.pth"), tmp_path / "ours.pt")
    export(tmp_path / "ours.pt", tmp_path / "again.pth")
    assert_same_tensors(torch.load(tmp_path / "again.pth", weights_only=True), published)
    has_recoverer = any(name.startswith("recoverer.") for name in checkpoint.load(tmp_path / "ours.pt")["model"])
    assert has_recoverer == ("midibert" in prefix)
    assert sorted(os.listdir(tmp_path)) == ["again.pth", "ours.pt", "published.pth"]


@pytest.mark.parametrize("kind", ["training checkpoint", "before PyTorch 1.6", "safetensors"])
def test_other_containers(kind, tmp_path):
    published = shaken(MidiBert("midibert")).state_dict()
    path = tmp_path / ("model.safetensors" if kind == "safetensors" else "model.ckpt")
    if kind == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(dict(published), path, metadata={"format": "pt"})
    elif kind == "training checkpoint":
        torch.save(training_checkpoint(published), path)
    else:
        torch.save(training_checkpoint(published), path, _use_new_zipfile_serialization=False)
    convert(path, tmp_path / "ours.pt")
    export(tmp_path / "ours.pt", tmp_path / "again.pth")
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert_same_tensors(again, published)
    MidiBert("midibert").load_state_dict(again)


def own_checkpoint(path, kind="pretrain", level="note", **more):
    config = Config(**{**PRESETS["tiny"], "layers": 3})
    torch.manual_seed(1)
    sizes = SIZES["octuple"]
    model = AdversarialMidiBert(config, sizes) if kind == "pretrain" else Classifier(config, sizes, level, 3)
    fields = [[field.name, field.values, field.size] for field in tokenizer.load("octuple").fields]
    state = {"kind": kind, "config": asdict(config), "fields": fields, "model": shaken(model).state_dict(), **more}
    checkpoint.save(path, state)
    return state["model"]


def test_our_own_checkpoint_comes_back(tmp_path):
    model = own_checkpoint(tmp_path / "best.pt")
    export(tmp_path / "best.pt", tmp_path / "published.pth")
    exported = torch.load(tmp_path / "published.pth", weights_only=True)
    theirs = MidiBert("octuple", width=64, field_width=16, reach=64, layers=3)
    missing, unexpected = theirs.load_state_dict(exported, strict=False)
    unused = ("bert.embeddings.word_", "bert.embeddings.position_", "bert.pooler.", "attention_linear.")
    assert all(name.startswith(unused) for name in missing)
    assert all(name.startswith(("mask_lm.proj.", "linear.")) for name in unexpected)
    words = torch.stack([torch.randint(size, (2, 30)) for size in SIZES["octuple"]], -1)
    ours = loaded_encoder(tmp_path / "best.pt")
    assert same_hidden_states(theirs.eval(), ours, words, torch.tensor([30, 11])) < 1e-5
    convert(tmp_path / "published.pth", tmp_path / "again.pt")
    assert_same_tensors(checkpoint.load(tmp_path / "again.pt")["model"], model)


@pytest.mark.parametrize(
    ("level", "heads"),
    [
        ("note", {"classifier.1": "classify.0", "classifier.3": "classify.2"}),
        ("sequence", {"attention.ws1": "attend.0", "attention.ws2": "attend.2", "classifier.0": "classify.0"}),
    ],
)
def test_a_fine_tuned_model_is_exported_with_its_head(level, heads, tmp_path):
    model = own_checkpoint(tmp_path / "model.pt", "finetune", level, task="melody", classes=["a", "b", "c"])
    export(tmp_path / "model.pt", tmp_path / "published.pth")
    exported = torch.load(tmp_path / "published.pth", weights_only=True)
    for theirs, ours in heads.items():
        assert torch.equal(exported[f"{theirs}.weight"], model[f"head.{ours}.weight"])
    convert(tmp_path / "published.pth", tmp_path / "again.pt")
    encoder = {name: tensor for name, tensor in model.items() if name.startswith("encoder.")}
    assert_same_tensors(checkpoint.load(tmp_path / "again.pt")["model"], encoder)


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_files_that_hold_code_are_refused_without_running_it(tmp_path):
    state = MidiBert("midibert").state_dict()
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Evil(tmp_path / "ran"), protocol=2))
    torch.save({"state_dict": state, "best_acc": Evil(tmp_path / "ran")}, tmp_path / "zip.pth")
    torch.save({**state, "x": Evil(tmp_path / "ran")}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("plain.pth", "zip.pth", "old.pth"):
        for function in (lambda path: convert(path, tmp_path / "ours.pt"), describe):
            with pytest.raises(CheckpointError, match=f"{name} is damaged, or holds more than weights"):
                function(tmp_path / name)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "ours.pt").exists()


def put(name: str, value):
    return lambda state: {**state, name: value}


def rename(change):
    """Names as `change` makes them; without those of which it makes nothing."""
    return lambda state: {change(name): tensor for name, tensor in state.items() if change(name)}


def each(change):
    return lambda state: {name: change(name, tensor) for name, tensor in state.items()}


TYPES = "bert.embeddings.token_type_embeddings.weight"
LORA = "bert.encoder.layer.0.attention.self.query.lora_A.weight"
BROKEN = [  # what is done to a state dict, what the error says
    (rename(lambda name: name * (name != "in_linear.bias")), "in_linear.bias is missing"),
    (rename(lambda name: name * (".layer." not in name)), "layer.0.* is missing"),
    (rename(lambda name: name.replace("r.1.", "r.3.")), r"layer.1.* is missing"),
    (rename(lambda name: name * (name != DISTANCE)), "layer.1.*distance_embedding.weight is missing"),
    (rename(lambda name: "module." * name.startswith("bert") + name), "layer.0.*is missing"),
    (put("in_linear.bias", torch.zeros(9)), r"in_linear.bias is \(9,\), should be \(32,\)"),
    (put("in_linear.bias", torch.full((WIDTH,), math.nan)), "in_linear.bias has values that are not finite"),
    (put("in_linear.bias", 3), "in_linear.bias is missing"),
    (put(TYPES, torch.zeros(3, WIDTH)), r"is \(3, 32\), should be \(2, 32\)"),
    (put(DISTANCE.replace("1", "0", 1), torch.zeros(48, 16)), "table of 48 x 16 does not go with width 32"),
    (put(LORA, torch.zeros(2, 2)), "lora_A.weight has no place in MidiBERT-Piano's layout"),
    (
        put("word_emb.2.lut.weight", torch.zeros(90, FIELD_WIDTH)),
        r"fields of \(4, 18, 90, 66\) ids are neither octuple \(",
    ),
    (each(lambda name, tensor: tensor[:, :8] if "distance" in name else tensor), "32 does not split into 4 heads"),
    (each(lambda _, tensor: tensor.half()), "is not a plain float32 tensor"),
    (lambda state: state | prefixed(state, "module."), "holds several models"),
    (lambda _: {"weight": torch.zeros(2)}, "neither a checkpoint of this program nor published"),
    (lambda _: [1, 2], "neither a checkpoint of this program nor published"),
    (lambda _: {"format": checkpoint.FORMAT, "version": 9}, "already|format version 9"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN)
def test_what_cannot_be_converted_gives_one_line_and_no_file(change, message, tmp_path):
    path = written(change(dict(MidiBert("midibert").state_dict())), tmp_path / "broken.pth")
    for function in (lambda path: convert(path, tmp_path / "ours.pt"), describe):
        with pytest.raises(CheckpointError, match=message) as error:
            function(path)
        assert "\n" not in str(error.value)
        assert str(path) in str(error.value)
    assert os.listdir(tmp_path) == ["broken.pth"]


def safetensors(header: bytes, numbers: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + numbers


def test_broken_safetensors(tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    entry = b'{"x": {"dtype": "F32", "shape": [%d], "data_offsets": [0, %d]}}'
    for content in (b"", b"\xff" * 99, safetensors(b"{" * 999), safetensors(entry % (9, 36), bytes(4)),
                    safetensors(entry % (1, 4), bytes(4))):  # fmt: skip
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"model\.safetensors is (damaged|neither)"):
            convert(tmp_path / "model.safetensors", tmp_path / "ours.pt")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read without safetensors: pip install"):
        convert(tmp_path / "model.safetensors", tmp_path / "ours.pt")


def test_other_files(tmp_path):
    whole = written(MidiBert("midibert").state_dict(), tmp_path / "whole").read_bytes()
    for name, content in {"half": whole[: len(whole) // 2], "empty": b"", "text": b"hello"}.items():
        (tmp_path / name).write_bytes(content)
    for name in ("half", "empty", "text", "missing", "."):
        for function in (describe, lambda path: convert(path, tmp_path / "ours.pt")):
            with pytest.raises(CheckpointError, match=str(tmp_path)):
                function(tmp_path / name)
    own_checkpoint(tmp_path / "best.pt")
    with pytest.raises(CheckpointError, match="a checkpoint of this program already"):
        convert(tmp_path / "best.pt", tmp_path / "ours.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint of this program"):
        export(tmp_path / "whole", tmp_path / "ours.pt")
    assert not (tmp_path / "ours.pt").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "other"}, "holds no model"),
        ({"model": {}}, "holds no model"),
        ({"model": {"encoder.words": 3}}, "in the place of weights"),
        ({"model": {"encoder.words": torch.zeros(1280, 16)}}, "encoder.token_type is missing"),
        ({"config": {"width": 64}}, "settings of a model"),
        ({"published": 3}, "in the place of weights"),
        ({"published": {"prefix": "", "kept": {"x": 1}}}, "in the place of weights"),
    ],
)
def test_damaged_checkpoints_of_ours_are_not_exported(change, message, tmp_path):
    own_checkpoint(tmp_path / "best.pt")
    checkpoint.save(tmp_path / "best.pt", checkpoint.load(tmp_path / "best.pt") | change)
    with pytest.raises(CheckpointError, match=message):
        export(tmp_path / "best.pt", tmp_path / "published.pth")
    assert os.listdir(tmp_path) == ["best.pt"]


def test_describe(tmp_path):
    theirs = written(prefixed(MidiBert("octuple").state_dict(), "module."), tmp_path / "published.pth")
    convert(theirs, tmp_path / "ours.pt")
    for path, what in (
        (theirs, "weights in the published layout of Adversarial-MidiBERT; `amb convert`"),
        (tmp_path / "ours.pt", "pre-training checkpoint, converted from the published layout of Adversarial-MidiBERT"),
    ):
        text = describe(path)
        for part in (what, "2 layers x 32, 2 heads", "24 notes", "adversarial", "alone, no head", "11 published"):
            assert part in text, part
    own_checkpoint(tmp_path / "last.pt", progress={"epoch": 3, "step": 1200})
    text = describe(tmp_path / "last.pt")
    for part in ("last.pt: pre-training checkpoint", "Bar, Position,", "recoverer 0.1 M", "epoch 3, step 1,200"):
        assert part in text, part
    assert "kept" not in text
    own_checkpoint(tmp_path / "model.pt", "finetune", "sequence", task="emotion", classes=["Q1", "Q2", "Q3"], notes=48)
    text = describe(tmp_path / "model.pt")
    for part in ("fine-tuned model", "emotion", "Q1, Q2, Q3", "48 a sequence", "head"):
        assert part in text, part
