"""Converted weights compute what Hugging Face's BertModel computes with them, and come back unchanged to the bit."""

import math
import os
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from amb import checkpoint, tokenizer, training
from amb.checkpoint import CheckpointError
from amb.config import PRESETS, Config
from amb.model import AdversarialMidiBert, Classifier, Encoder
from amb.published import convert, describe, export
from tests.scripts import Evil, different

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(transformers.__version__ > "5", reason="its BertModel has no relative positions")
WIDTH, FIELD_WIDTH, REACH = 32, 8, 24
SIZES = {"octuple": (262, 134, 135, 262, 134, 38, 260, 55), "midibert": (4, 18, 88, 66)}
DISTANCE = "bert.encoder.layer.1.attention.self.distance_embedding.weight"
BOTH = pytest.mark.parametrize("encoding", ["octuple", "midibert"])


class MidiBert(nn.Module):
    """The published encoder's module tree: names, shapes and forward pass."""

    def __init__(self, encoding: str, width=WIDTH, field_width=FIELD_WIDTH, reach=REACH, layers=2, heads=2):
        super().__init__()
        sizes, joined = SIZES[encoding], len(SIZES[encoding]) * field_width
        config = transformers.BertConfig(
            vocab_size=20, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
            intermediate_size=4 * width, max_position_embeddings=reach, position_embedding_type="relative_key_query",
            attn_implementation="eager",
        )  # fmt: skip
        self.bert = transformers.BertModel(config)
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
    """The published recoverer around it, and the published masker's layers."""

    def __init__(self, encoding: str):
        super().__init__()
        self.midibert = MidiBert(encoding)
        self.mask_lm = nn.ModuleDict({"proj": nn.ModuleList(nn.Linear(WIDTH, size) for size in SIZES[encoding])})
        self.linear = nn.Sequential(nn.Dropout(0.1), nn.Linear(WIDTH, 256), nn.ReLU(), nn.Linear(256, 1), nn.Sigmoid())


def shaken(module: nn.Module) -> nn.Module:
    """Every parameter away from its start: a zero bias or a LayerNorm of ones would hide a mistake."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + ("LayerNorm.weight" in name))
    return module.eval()


def written(state, path):
    torch.save(state, path)
    return path


def converted(state, folder) -> dict:
    convert(written(state, folder / "published.pth"), folder / "ours.pt")
    return checkpoint.load(folder / "ours.pt")


def exported(path) -> dict:
    export(path, path.with_name("again.pth"))
    return torch.load(path.with_name("again.pth"), weights_only=True)


def loaded_encoder(path) -> Encoder:
    content = checkpoint.load(path)
    config = checkpoint.config_of(content, path)
    encoder = Encoder(config, tuple(size for _, _, size in content["fields"]))
    checkpoint.load_encoder(encoder, content, path)
    return encoder.eval()


def same_hidden_states(original: MidiBert, ours: Encoder, words: torch.Tensor, lengths: torch.Tensor) -> float:
    valid = torch.arange(words.shape[1]) < lengths[:, None]
    with torch.no_grad():
        return (ours(words, lengths)[valid] - original(words, valid)[valid]).abs().max().item()


@BOTH
def test_a_converted_encoder_equals_hugging_face_and_has_its_sizes(encoding, midi_folder, tmp_path):
    reach, original = 40, shaken(MidiBert(encoding, width=48, field_width=12, reach=40, heads=3))
    content = converted(original.state_dict(), tmp_path)
    objective = {"octuple": "adversarial", "midibert": "random"}[encoding]
    sizes = dict(layers=2, width=48, heads=3, reach=40, notes=40, field_width=12)
    assert content["kind"] == "pretrain"
    assert Config(**content["config"]) == Config(encoding=encoding, objective=objective, **sizes)
    assert content["fields"] == [[f.name, f.values, f.size] for f in tokenizer.load(encoding).fields]
    ours = loaded_encoder(tmp_path / "ours.pt")
    for length in (reach, 7, 1):
        words = torch.stack([torch.randint(size, (3, length)) for size in SIZES[encoding]], -1)
        assert same_hidden_states(original, ours, words, torch.tensor([length, max(1, length // 2), 1])) < 1e-5
    pieces = [tokenizer.load(encoding).encode(file)[:reach] for file in sorted(midi_folder.rglob("*.mid"))[:3]]
    words = torch.from_numpy(np.stack(pieces).astype(np.int64))
    lengths = torch.tensor([reach, 17, 5])
    valid = torch.arange(reach) < lengths[:, None]
    words[~valid] = torch.from_numpy(tokenizer.load(encoding).pad.astype(np.int64))
    original, ours, ours.dtype = original.double(), ours.double(), torch.float64
    assert same_hidden_states(original, ours, words, lengths) < 1e-9
    direction = torch.randn(3, reach, 48) * valid[..., None]
    (ours(words, lengths) * direction).sum().backward()
    loss, names = (original(words, valid) * direction).sum(), dict(original.named_parameters())
    gradients = torch.autograd.grad(loss, names.values(), allow_unused=True, materialize_grads=True)
    expected = converted({name: x.float() for name, x in zip(names, gradients, strict=True)}, tmp_path)["model"]
    for name, parameter in ours.named_parameters():
        assert (parameter.grad - expected[f"encoder.{name}"]).norm() < 1e-6 * parameter.grad.norm(), name


def test_a_converted_recoverer_and_masker_equal_the_published_ones(tmp_path):
    original = shaken(MidiBertLM("octuple"))
    content = converted(original.state_dict(), tmp_path)
    ours = AdversarialMidiBert(Config(**content["config"]), SIZES["octuple"]).eval()
    checkpoint.load_weights(ours, content["model"], tmp_path / "ours.pt")
    hidden = torch.randn(2, 5, WIDTH)
    for logits, layer in zip(ours.recoverer(hidden), original.mask_lm["proj"], strict=True):
        torch.testing.assert_close(logits, layer(hidden))
    torch.testing.assert_close(ours.masker(hidden), original.linear(hidden).squeeze(-1))


def prefixed(state: dict, prefix: str) -> dict:
    return {prefix + name: tensor for name, tensor in state.items()}


@BOTH
@pytest.mark.parametrize("prefix", ["", "module.midibert.", "model."])
def test_round_trips_are_exact_under_every_prefix(encoding, prefix, tmp_path):
    model = shaken(MidiBertLM(encoding) if "midibert" in prefix else MidiBert(encoding))
    published = prefixed(model.state_dict(), prefix.removesuffix("midibert."))
    published[prefix + "bert.embeddings.position_ids"] = torch.arange(REACH)[None]  # transformers before 4.31
    if "midibert" in prefix:
        published[prefix.removesuffix("midibert.") + "classifier.1.weight"] = torch.randn(3, WIDTH)
    content = converted(published, tmp_path)
    assert not different(exported(tmp_path / "ours.pt"), published)
    assert any(name.startswith("recoverer.") for name in content["model"]) == ("midibert" in prefix)
    assert sorted(os.listdir(tmp_path)) == ["again.pth", "ours.pt", "published.pth"]


@pytest.mark.parametrize("kind", ["training checkpoint", "before PyTorch 1.6", "safetensors"])
def test_other_containers(kind, tmp_path):
    published = dict(shaken(MidiBert("midibert")).state_dict())
    path = tmp_path / ("model.safetensors" if kind == "safetensors" else "model.ckpt")
    if kind == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(published, path, metadata={"format": "pt"})
    else:  # as MidiBERT-Piano's trainer writes it
        optimizer = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
        content = {"epoch": 12, "state_dict": published, "valid_acc": [0.5, 0.25], "optimizer": optimizer}
        torch.save(content, path, _use_new_zipfile_serialization=kind == "training checkpoint")
    convert(path, tmp_path / "ours.pt")
    assert not different(exported(tmp_path / "ours.pt"), published)


def save_checkpoint(path, kind="pretrain", level="note", **more):
    config, sizes = Config(**{**PRESETS["tiny"], "layers": 3}), SIZES["octuple"]
    model = AdversarialMidiBert(config, sizes) if kind == "pretrain" else Classifier(config, sizes, level, 3)
    weights = dict(shaken(model).state_dict())
    checkpoint.save(path, {"kind": kind, **training.about(config), "model": weights, **more})
    return weights


def test_our_own_checkpoint_comes_back(tmp_path):
    model = save_checkpoint(tmp_path / "best.pt")
    published = exported(tmp_path / "best.pt")
    original = MidiBert("octuple", width=64, field_width=16, reach=64, layers=3)
    missing, unexpected = original.load_state_dict(published, strict=False)
    unused = ("bert.embeddings.word_", "bert.embeddings.position_", "bert.pooler.", "attention_linear.")
    assert all(name.startswith(unused) for name in missing)
    assert all(name.startswith(("mask_lm.proj.", "linear.")) for name in unexpected)
    words = torch.stack([torch.randint(size, (2, 30)) for size in SIZES["octuple"]], -1)
    ours = loaded_encoder(tmp_path / "best.pt")
    assert same_hidden_states(original.eval(), ours, words, torch.tensor([30, 11])) < 1e-5
    assert not different(converted(published, tmp_path)["model"], model)


@pytest.mark.parametrize(
    ("level", "published"),
    [
        ("note", ("classifier.1", "classifier.3")),
        ("sequence", ("classifier.0", "classifier.2", "attention.ws1", "attention.ws2")),
    ],
)
def test_a_fine_tuned_model_is_exported_with_its_head(level, published, tmp_path):
    model = save_checkpoint(tmp_path / "model.pt", "finetune", level, task="melody", classes=["a", "b", "c"])
    state = exported(tmp_path / "model.pt")
    for name, layer in zip(published, ("classify.0", "classify.2", "attend.0", "attend.2"), strict=False):
        assert torch.equal(state[f"{name}.weight"], model[f"head.{layer}.weight"])
    encoder = {name: tensor for name, tensor in model.items() if name.startswith("encoder.")}
    assert not different(converted(state, tmp_path)["model"], encoder)


def assert_refused(path, message):
    """By all that read published weights, in one line that names the file, and without a file."""
    for function in (lambda path: convert(path, path.with_name("new.pt")), describe):
        with pytest.raises(CheckpointError, match=message) as error:
            function(path)
        assert "\n" not in str(error.value)
        assert str(path) in str(error.value)
    assert not path.with_name("new.pt").exists()


@pytest.mark.parametrize("new", [True, False])
def test_files_that_hold_code_are_refused_without_running_it(new, tmp_path):
    content = {"state_dict": MidiBert("midibert").state_dict(), "best_acc": Evil(tmp_path / "ran")}
    torch.save(content, tmp_path / "evil.pth", _use_new_zipfile_serialization=new)
    assert_refused(tmp_path / "evil.pth", "evil.pth is damaged, or holds more than weights")
    assert not (tmp_path / "ran").exists()


def put(name: str, value):
    return lambda state: {**state, name: value}


def without(part: str):
    return lambda state: {name: tensor for name, tensor in state.items() if part not in name}


TYPES = "bert.embeddings.token_type_embeddings.weight"
LORA = "bert.encoder.layer.0.attention.self.query.lora_A.weight"
BROKEN = [  # what is done to a state dict, what the error says
    (without(".layer."), "is damaged"),
    (without(DISTANCE), "layer.1.*distance_embedding.weight, is missing"),
    (put("in_linear.bias", 3), "published as in_linear.bias, is missing"),
    (put("in_linear.bias", torch.zeros(9)), r"projection.bias is \(9,\), should be \(32,\)"),
    (
        put("in_linear.bias", torch.full((WIDTH,), math.nan)),
        "projection.bias is not a plain float32 tensor of finite numbers",
    ),
    (put(TYPES, torch.zeros(3, WIDTH)), "is damaged"),
    (put(DISTANCE.replace("1", "0", 1), torch.zeros(48, 16)), r"layers.0.distance is \(48, 16\), should be \(47, 16\)"),
    (put(LORA, torch.zeros(2, 2)), "lora_A.weight has no place in MidiBERT-Piano's layout"),
    (
        put("word_emb.2.lut.weight", torch.zeros(90, FIELD_WIDTH)),
        r"fields of \(4, 18, 90, 66\) ids are neither octuple",
    ),
    (lambda state: {n: t[:, :8] if "distance" in n else t for n, t in state.items()}, "32 does not split into 4 heads"),
    (lambda state: {name: tensor.half() for name, tensor in state.items()}, "is not a plain float32 tensor"),
    (lambda state: state | prefixed(state, "module."), "holds several models"),
    (lambda _: {"weight": torch.zeros(2)}, "neither a checkpoint of this program nor published"),
    (lambda _: [1, 2], "neither a checkpoint of this program nor published"),
    (lambda _: {"format": checkpoint.FORMAT, "version": 9}, "already|format version 9"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN)
def test_what_cannot_be_converted_gives_one_line_and_no_file(change, message, tmp_path):
    assert_refused(written(change(dict(MidiBert("midibert").state_dict())), tmp_path / "broken.pth"), message)


def safetensors(header: bytes, numbers: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + numbers


def test_broken_safetensors(tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    entry = b'{"x": {"dtype": "F32", "shape": [%d], "data_offsets": [0, %d]}}'
    for content in (b"", safetensors(b"{" * 999), safetensors(entry % (9, 36), bytes(4))):
        (tmp_path / "model.safetensors").write_bytes(content)
        assert_refused(tmp_path / "model.safetensors", r"model\.safetensors is (damaged|neither)")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert_refused(tmp_path / "model.safetensors", "cannot be read without safetensors: pip install")


def test_published_weights_are_not_exported(tmp_path):
    written(MidiBert("midibert").state_dict(), tmp_path / "published.pth")
    with pytest.raises(CheckpointError, match="not a checkpoint of this program"):
        export(tmp_path / "published.pth", tmp_path / "ours.pt")
    assert not (tmp_path / "ours.pt").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {}}, "holds no model"),
        ({"model": {"encoder.words": 3}}, "holds no weights"),
        ({"model": {"encoder.words": torch.zeros(1280, 16)}}, "encoder.token_type, .* is missing"),
        ({"config": {"width": 64}}, "settings of a model"),
        ({"published": 3}, "holds no model"),
        ({"published": {"prefix": "", "kept": {"x": 1}}}, "holds no weights"),
    ],
)
def test_damaged_checkpoints_of_ours_are_not_exported(change, message, tmp_path):
    save_checkpoint(tmp_path / "best.pt")
    checkpoint.save(tmp_path / "best.pt", checkpoint.load(tmp_path / "best.pt") | change)
    with pytest.raises(CheckpointError, match=message):
        export(tmp_path / "best.pt", tmp_path / "published.pth")
    assert os.listdir(tmp_path) == ["best.pt"]


def test_describe(tmp_path):
    converted(prefixed(MidiBert("octuple").state_dict(), "module."), tmp_path)
    save_checkpoint(tmp_path / "last.pt", progress={"epoch": 3, "step": 1200})
    save_checkpoint(tmp_path / "model.pt", "finetune", "sequence", task="emotion", classes=["Q1", "Q2", "Q3"], notes=48)
    shapes = ("2 layers x 32, 2 heads", "24 notes", "adversarial", "alone, no head")
    layout = "the published layout of Adversarial-MidiBERT"
    for name, parts in {
        "published.pth": (f"weights in {layout}; `amb convert`", *shapes),
        "ours.pt": (f"pre-training checkpoint, converted from {layout}", *shapes),
        "last.pt": ("last.pt: pre-training checkpoint", "Bar, Position,", "recoverer 0.1 M", "epoch 3, step 1,200"),
        "model.pt": ("fine-tuned model", "emotion", "Q1, Q2, Q3", "48 a sequence", "head"),
    }.items():
        text = describe(tmp_path / name)
        assert not [part for part in parts if part not in text], name
