"""Published weights of Adversarial-MidiBERT (octuple) and MidiBERT-Piano (midibert): to our checkpoints, and back.

Both are state dicts of one module tree around Hugging Face's BertModel; the prefix depends on which module was saved:

    PREFIX word_emb.F.lut, in_linear, bert.embeddings, bert.encoder.layer.I     the encoder
    PREFIX bert.pooler, attention_linear, …                                     never used by a forward pass
    mask_lm.proj.F, linear, classifier, attention                               recoverer, masker, classifiers

Order of fields, ids with their specials, factor sqrt(e) and sign of the distance tables are ours too, so converting
only renames and stacks. Tensors without use here are kept, so that `export` restores every tensor to the bit.
Sources: RS2002/Adversarial-MidiBERT (model.py, pretrain.py), RS2002/PianoBart (Data/data_generation/make_dict.py) and
wazenmai/MIDI-BERT (MidiBERT/model.py, MidiBERT/trainer.py, data_creation/prepare_data/dict/make_dict.py) on GitHub.
"""

import re
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

from amb import checkpoint, tokenizer
from amb.checkpoint import CheckpointError
from amb.config import Config
from amb.files import writing
from amb.model import AdversarialMidiBert, Classifier
from amb.training import about

PROJECTS = {"octuple": "Adversarial-MidiBERT", "midibert": "MidiBERT-Piano"}  # whose weights read which words
KINDS = {"pretrain": "pre-training checkpoint", "finetune": "fine-tuned model"}

MARK = "word_emb.0.lut.weight"  # every published model has it; what stands before it is the prefix
TOKEN_TYPES = "bert.embeddings.token_type_embeddings.weight"  # [2, d], of which the forward pass uses row 0
DISTANCE = "attention.self.distance_embedding.weight"
LAYER = {  # in our encoder.layers.I: in their bert.encoder.layer.I
    "query_key_value": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "distance": (DISTANCE,),
    "attention_out": ("attention.output.dense",),
    "attention_norm": ("attention.output.LayerNorm",),
    "up": ("intermediate.dense",),
    "down": ("output.dense",),
    "output_norm": ("output.LayerNorm",),
}
UNUSED = r"bert\.(embeddings\.(word_embeddings|position_embeddings|position_ids|token_type_ids)|pooler)"
ENCODER = rf"(?!{UNUSED})(word_emb|in_linear|bert)\."  # what must have a place in our encoder


def convert(source: Path, out: Path) -> None:
    """A published file (state dict, training checkpoint or .safetensors) -> a checkpoint of ours, kind "pretrain".

    All sizes are read off the tensors' shapes. Recoverer and masker are in it only if the file has them.
    Raises CheckpointError, one line that names the file, for anything else; `out` is then left as it was.
    """
    checkpoint.save(out, _from_published(_read(source), source))


def export(source: Path, out: Path) -> None:
    """A checkpoint of ours -> a state dict with the published names, plain tensors for `torch.load`.

    One that was converted becomes the published file's again, every tensor under its name and equal to the bit. Others
    become names without prefix, with their heads but without what only BERT has: load them with strict=False.
    Raises CheckpointError as `convert`.
    """
    content = checkpoint.load(source)
    config, model, prefix, kept = _parts(content, source)
    sizes, classes = tokenizer.load(config.encoding).sizes, model.get("head.classify.2.bias")
    level = "sequence" if "head.attend.0.weight" in model else "note"
    with torch.device("meta"):
        ours = AdversarialMidiBert(config, sizes) if classes is None else Classifier(config, sizes, level, len(classes))
    names, state = _published_names(ours, prefix, model, source), dict(kept)
    model = _checked({name: model[name] for name in names}, ours, source)
    for name, parts in names.items():
        tensor = model[name]
        if name == "encoder.token_type":
            tensor = torch.stack([tensor, kept.get(prefix + TOKEN_TYPES, torch.zeros_like(tensor))])
        by_field = name.startswith(("encoder.words", "recoverer."))
        pieces = tensor.split(sizes) if by_field else tensor.chunk(len(parts))
        state |= {part: piece.clone() for part, piece in zip(parts, pieces, strict=True)}
    with writing(out) as file:
        torch.save(state, file)


def describe(path: Path) -> str:
    """What a checkpoint of ours or a published file holds, a few lines. Raises CheckpointError as `convert`."""
    content = _read(path)
    ours = content.get("format") == checkpoint.FORMAT
    content = checkpoint.load(path) if ours else _from_published(content, path)
    config, model, _, kept = _parts(content, path)
    kind, project = KINDS[content["kind"]], PROJECTS.get(config.encoding, "MidiBERT-Piano")  # once, `cp` was midibert
    if not ours:
        kind = f"weights in the published layout of {project}; `amb convert` makes a checkpoint of them"
    elif kept:
        kind += f", converted from the published layout of {project}"
    counts = Counter()
    for name, tensor in model.items():
        counts[name.split(".")[0]] += tensor.numel()
    parts = ", ".join(f"{part} {count / 1e6:.1f} M" for part, count in counts.items())
    fields = ", ".join(tokenizer.load(config.encoding).names)
    lines = {
        "encoding": f"{config.encoding}: {fields}",
        "encoder": f"{config.layers} layers x {config.width}, {config.heads} heads, fields {config.field_width} wide",
        "reach": f"{config.reach:,} notes",
        "parameters": f"{counts.total() / 1e6:.1f} M: {parts}" + ("" if len(counts) > 1 else " alone, no head"),
        "notes": f"{content.get('notes', config.notes):,} a sequence",
    }
    if content["kind"] == "pretrain":
        lines["objective"] = config.objective
    else:
        lines |= {"task": content.get("task"), "classes": ", ".join(content.get("classes", []))}
    if "progress" in content:
        lines["progress"] = f"epoch {content['progress']['epoch']}, step {content['progress']['step']:,}"
    return "\n".join([f"{path}: {kind}", *(f"  {name:<11} {line}" for name, line in lines.items())])


def _from_published(content: dict, path: Path) -> dict:
    """The content of our checkpoint for what was read from a published file."""
    state, prefix = _find_model(content, path)
    config = _config_of_shapes(state, prefix, path)
    with torch.device("meta"):
        ours = AdversarialMidiBert(config, tokenizer.load(config.encoding).sizes)
    names = _published_names(ours, prefix, state, path)
    kept = {name: tensor for name, tensor in state.items() if name not in set().union(*names.values())}
    for name in kept:
        if re.match(re.escape(prefix) + ENCODER, name):
            raise CheckpointError(f"{path}: {name} has no place in {PROJECTS[config.encoding]}'s layout")
    with checkpoint.reading(path):  # shapes may not go together
        model = {name: torch.cat([state[part] for part in parts]) for name, parts in names.items()}
        model["encoder.token_type"], second = (row.clone() for row in model["encoder.token_type"])
    return {
        "kind": "pretrain",
        **about(config),
        "model": _checked(model, ours, path),
        "published": {"prefix": prefix, "kept": kept | {prefix + TOKEN_TYPES: second}},
    }


def _find_model(content: dict, path: Path) -> tuple[dict[str, Tensor], str]:
    """The state dict in what was read, whatever wraps it ({"state_dict": …, "epoch": …}), and its names' prefix."""
    if content.get("format") == checkpoint.FORMAT:
        raise CheckpointError(f"{path} is a checkpoint of this program already")
    parts = [part for part in (content, *content.values()) if isinstance(part, dict)]
    models = [(part, name) for part in parts for name in part if isinstance(name, str) and name.endswith(MARK)]
    if not models:
        raise CheckpointError(f"{path} is neither a checkpoint of this program nor published weights: no {MARK}")
    if len(models) > 1:
        raise CheckpointError(f"{path} holds several models: {', '.join(name for _, name in models)}")
    part, prefix = models[0][0], models[0][1].removesuffix(MARK)
    return {name: value for name, value in part.items() if isinstance(value, Tensor)}, prefix


def _config_of_shapes(state: dict[str, Tensor], prefix: str, path: Path) -> Config:
    """The settings that a published encoder's shapes imply, for sequences as long as its distance tables reach."""
    shapes = {name.removeprefix(prefix): tuple(tensor.shape) for name, tensor in state.items()}
    layers = {name.split(".")[3] for name in shapes if name.startswith("bert.encoder.layer.")}
    tables = sum(name.startswith("word_emb.") for name in shapes)
    with checkpoint.reading(path):  # tensors may be missing or be no matrices
        sizes = tuple(shapes[f"word_emb.{f}.lut.weight"][0] for f in range(tables))
        (rows, head_width), (width, _) = shapes[f"bert.encoder.layer.0.{DISTANCE}"], shapes["in_linear.weight"]
        _, field_width = shapes[MARK]
    encoding = next((name for name in PROJECTS if tokenizer.load(name).sizes == sizes), None)
    if not encoding:
        known = " nor ".join(f"{name} {tokenizer.load(name).sizes}" for name in PROJECTS)
        raise CheckpointError(f"{path} is of another encoding: fields of {sizes} ids are neither {known}")
    heads, reach = width // max(1, head_width), (rows + 1) // 2
    objective = "adversarial" if encoding == "octuple" else "random"
    widths = dict(layers=len(layers), width=width, heads=heads, field_width=field_width)
    try:
        return Config(encoding=encoding, objective=objective, notes=reach, reach=reach, **widths)
    except ValueError as error:
        raise CheckpointError(f"{path} has shapes that no model here can have: {error}") from None


def _published_names(ours: nn.Module, prefix: str, present: dict, path: Path) -> dict[str, list[str]]:
    """For each parameter of `ours`, the published ones that it is, one below the other.

    Only those heads are in it that `present`, a state dict of either side, has any parameter of. Raises CheckpointError
    where it lacks another.
    """
    fields, root = range(len(ours.encoder.sizes)), prefix.removesuffix("midibert.")
    dropout = int(getattr(ours, "level", None) == "note")  # a module of their classifier of notes that has a number
    published = {
        "encoder.words": [f"{prefix}word_emb.{f}.lut.weight" for f in fields],
        "encoder.projection": [f"{prefix}in_linear"],
        "encoder.token_type": [prefix + TOKEN_TYPES],
        "encoder.norm": [f"{prefix}bert.embeddings.LayerNorm"],
        "recoverer.out": [f"{root}mask_lm.proj.{f}" for f in fields],
        "masker.score.0": [f"{root}linear.1"],
        "masker.score.2": [f"{root}linear.3"],
        "head.attend.0": [f"{root}attention.ws1"],
        "head.attend.2": [f"{root}attention.ws2"],
        "head.classify.0": [f"{root}classifier.{dropout}"],
        "head.classify.2": [f"{root}classifier.{dropout + 2}"],
    }
    for i in range(len(ours.encoder.layers)):
        layer = f"{prefix}bert.encoder.layer.{i}."
        published |= {f"encoder.layers.{i}.{name}": [layer + part for part in parts] for name, parts in LAYER.items()}
    names = {}
    for name, _ in ours.named_parameters():
        module, _, kind = name.rpartition(".")
        names[name] = published.get(name) or [f"{part}.{kind}" for part in published[module]]
    heads = {name.split(".")[0] for name, parts in names.items() if present.keys() & {name, *parts}}
    names = {name: parts for name, parts in names.items() if name.split(".")[0] in {"encoder", *heads}}
    for name, parts in names.items():
        if name not in present and not present.keys() >= {*parts}:
            raise CheckpointError(f"{path}: {name}, published as {parts[0]}, is missing")
    return names


def _checked(model: dict[str, Tensor], ours: nn.Module, path: Path) -> dict[str, Tensor]:
    """`model`, if it is plain finite float32 tensors of the shapes of `ours`."""
    for name, tensor in model.items():
        shape = tuple(ours.get_parameter(name).shape)
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"{path}: {name} is {tuple(tensor.shape)}, should be {shape}")
        if tensor.dtype != torch.float32 or tensor.layout != torch.strided or not tensor.isfinite().all():
            raise CheckpointError(f"{path}: {name} is not a plain float32 tensor of finite numbers")
    return model


def _parts(content: dict, path: Path) -> tuple[Config, dict[str, Tensor], str, dict[str, Tensor]]:
    """Settings and weights of a checkpoint of ours; if it was converted, the prefix and what was kept."""
    published = content.get("published", {"prefix": "", "kept": {}})
    if content.get("kind") not in KINDS or not content.get("model") or not isinstance(published, dict):
        raise CheckpointError(f"{path} holds no model")
    model = checkpoint.weights_of(content, "", path)
    kept = checkpoint.weights_of({"model": published.get("kept")}, "", path)
    return checkpoint.config_of(content, path), model, str(published.get("prefix")), kept


def _read(path: Path) -> dict:
    """What a file of PyTorch's or safetensors' holds, as data; nothing in it is run. Raises CheckpointError."""
    if path.suffix != ".safetensors":
        with checkpoint.reading(path):
            content = torch.load(path, map_location="cpu", weights_only=True)
        return content if isinstance(content, dict) else {}
    try:
        import safetensors.torch
    except ImportError:
        raise CheckpointError(f"{path} cannot be read without safetensors: pip install safetensors") from None
    with checkpoint.reading(path):
        try:
            return safetensors.torch.load(path.read_bytes())
        except safetensors.SafetensorError as error:
            raise ValueError from error
