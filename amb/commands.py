"""What each command of `amb` does: results to stdout or into a file, all else to stderr. Errors are raised, one line.

torch is imported when a command runs, so that `amb --help` answers at once.
"""

import json
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import numpy as np

import amb
from amb import pieces
from amb.console import Progress, check_out, minutes, percent, print_bias, row, shown, titles
from amb.tokenizer import PERCUSSION, edit, read_midi


def predict(args: Namespace) -> int:
    """`amb predict`: a row or a JSON line for each piece."""
    model = amb.load(args.checkpoint, args.device, args.dtype)
    files = pieces.find(args.files)
    width = max(len("file"), *(min(len(shown(file)), 56) for file in files))
    progress = Progress(len(files), model.device)
    by_note = bool(model.task) and model.task.level == "note"
    if args.segments and by_note:
        raise ValueError(f"{model.path} labels notes ({model.task.name}), so its pieces have no --segments")
    for found in model.each_prediction(files, args.workers):
        if found.error:
            progress.skip(found.file, found.error)
            continue
        if not progress.pieces and not args.json:
            progress.write(row("file", width, "notes" if by_note else "class", found.classes, found.classes))
        progress.done(found.notes)
        if args.json:
            progress.write(json.dumps(as_json(found, model.task.name, args.segments)))
            continue
        label = f"{found.notes:,}" if by_note else found.label
        progress.write(row(found.file, width, label, found.classes, percent(found.probabilities)))
        for part, span in zip(found.segments, found.spans, strict=True) if args.segments else ():
            p = np.exp(part)
            name = f"  {minutes(span[0])} - {minutes(span[1])}"
            progress.write(row(name, width, found.classes[int(p.argmax())], found.classes, percent(p)))
    return progress.finish("predicted")


def as_json(found, task: str, segments: bool) -> dict:
    """One prediction as plain values: for note tasks the share of the notes of each class."""
    values = dict(zip(found.classes, found.probabilities.round(6).tolist(), strict=True))
    if found.level == "note":
        return {"file": found.file, "task": task, "notes": found.notes, "shares": values, "dropped": found.dropped}
    line = {"file": found.file, "task": task, "class": found.label, "probabilities": values, "notes": found.notes}
    if segments:
        rows = zip(found.spans.round(3).tolist(), found.counts.tolist(), np.exp(found.segments), strict=True)
        line["segments"] = [
            {
                "start": start,
                "end": end,
                "notes": count,
                "class": found.classes[int(p.argmax())],
                "probabilities": dict(zip(found.classes, p.round(6).tolist(), strict=True)),
            }
            for (start, end), count, p in rows
        ]
    return line


def melody(args: Namespace) -> int:
    """`amb melody`: a MIDI file of the notes predicted MELODY, with `bridge` also BRIDGE, or of all in three tracks."""
    model, score, piece, found = perform(args, "melody")
    labels, names = found.labels, list(found.classes)
    unseen, drums = labels < 0, piece.notes.instrument == PERCUSSION
    rest = names.index("PIANO")
    labels = np.where(unseen | drums, rest, labels)
    if args.split:
        out = edit.split(score, labels, names, endless_part=rest)
    else:
        wanted = ("MELODY", "BRIDGE") if args.bridge else ("MELODY",)
        taken = np.isin(labels, [names.index(name) for name in wanted])
        out = edit.split(score, np.where(taken, 0, -1), ["MELODY"])
    save(out, args.out)
    counts = {name: (labels == number).sum() for number, name in enumerate(names)}
    print(f"{args.out}: of {len(labels):,} notes " + ", ".join(f"{count:,} {name}" for name, count in counts.items()))
    if counts["BRIDGE"] > counts["MELODY"] and not (args.bridge or args.split):
        print("most of what leads is called BRIDGE, as where no voice sings: --bridge takes it too")
    unheard = {"percussion": int(drums.sum())} | {reason: count for reason, count in found.dropped.items()}
    for reason, count in unheard.items():
        if count:
            print(f"taken for accompaniment: {count:,} notes ({reason})")
    extra = len(out.tracks) - 1 - (len(names) if args.split else 1)
    if extra:
        print(f"{extra} further tracks of the same names hold notes that overlap others of their pitch and channel")
    return 0


def velocity(args: Namespace) -> int:
    """`amb velocity`: the same MIDI file with predicted velocities."""
    model, score, piece, found = perform(args, "velocity")
    centres = np.array([(int(low) + int(high) + 1) // 2 for low, high in (c.split("-") for c in found.classes)])
    seen = found.labels >= 0
    velocities = np.zeros(len(seen), dtype=np.int64)  # 0: as it is
    if args.bins:
        velocities[seen] = centres[found.labels[seen]]
    else:
        velocities[seen] = np.rint(np.exp(found.log_p[seen]) @ centres)
    velocities[seen] = velocities[seen].clip(1, 127)
    save(edit.set_velocities(score, velocities), args.out)
    given = velocities[seen]
    print(
        f"{args.out}: {len(given):,} notes have velocities {given.min()} to {given.max()}, mean {given.mean():.1f} "
        f"(before: {piece.notes.velocity[seen].min()} to {piece.notes.velocity[seen].max()})"
    )
    for reason, count in found.dropped.items():
        print(f"left as they were: {count:,} notes ({reason})")
    return 0


def perform(args: Namespace, task: str):
    """What `melody` and `velocity` begin with: the model, the file's messages, the piece, the notes' prediction."""
    check_out(args.out, args.midi)
    model = amb.load(args.checkpoint, args.device, args.dtype)
    if not model.task or model.task.name != task:
        raise ValueError(
            f"{model.path} is {model.about()}: `amb {task}` needs one fine-tuned with finetune.py --task {task}"
        )
    try:
        score, piece = read_midi(args.midi), model.encode(args.midi)
    except ValueError as error:
        raise ValueError(f"{args.midi}: {error}") from None
    return model, score, piece, model.predict_pieces([piece])[0]


def embed(args: Namespace) -> int:
    """`amb embed`: vectors of pieces, and with --notes of notes, into an .npz file."""
    from amb import checkpoint
    from amb.inference import NoteEmbeddings, note_columns

    check_out(args.out)
    model = amb.load(args.checkpoint, args.device, args.dtype)
    files = pieces.find(args.files)
    progress = Progress(len(files), model.device)
    names, vectors, counts, columns = [], [], [], []
    # the vectors of notes may be more than memory holds: they wait in a file
    with tempfile.TemporaryFile(dir=args.out.parent) as waiting:
        for outcome, states in model.each_embedding(files, args.layer, args.workers):
            if states is None:
                progress.skip(outcome.file, outcome.reason)
                continue
            progress.done(len(states))
            if args.notes:
                waiting.write(states.tobytes())
                columns.append(note_columns(outcome, states, len(names))[1:])
            names.append(outcome.file)
            vectors.append(states.mean(axis=0, dtype=np.float64).astype(np.float32))
            counts.append(len(states))
        if not names:
            return progress.finish("embedded")
        arrays = {"names": np.array(names), "vectors": np.stack(vectors), "counts": np.array(counts)}
        if args.notes:
            waiting.flush()
            shape = (sum(counts), model.config.width)
            arrays["note_vectors"] = np.memmap(waiting, dtype=np.float32, mode="r", shape=shape)
            joined = map(np.concatenate, zip(*columns, strict=True))
            arrays |= {f"note_{name}": column for name, column in zip(NoteEmbeddings._fields[1:], joined, strict=True)}
        with checkpoint.writing(args.out) as file:
            np.savez(file, **arrays)
    status = progress.finish("embedded")
    print(f"{args.out}: " + ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items()))
    return status


def inspect(args: Namespace) -> int:
    """`amb inspect`: the bias in numbers, and with --out one page of pictures."""
    from amb import frozen, inspection, inspection_page, plots

    if args.out:
        check_out(args.out)
        if not plots.available():
            raise ValueError("--out needs matplotlib: pip install matplotlib (the extra `plot`)")
    models = [amb.load(path, args.device, args.dtype) for path in (args.checkpoint, args.beside) if path]
    if len({model.encoding.name for model in models}) > 1:
        raise ValueError(f"{args.beside} reads {models[1].encoding.name} words, {args.checkpoint} others")
    read, views = [], [[] for _ in models]
    for file in pieces.find(args.files):
        try:
            piece = models[0].encode(file)
        except ValueError as error:
            print(f"skipped {shown(file)}: {error}", file=sys.stderr)
            continue
        read.append(piece)
        for seen, model in zip(views, models, strict=True):
            seen.append(inspection.inspect(model, piece))
    if not read:
        raise ValueError("no usable MIDI file was given")
    words = np.concatenate([piece.words for piece in read])
    tables = [
        inspection.bias(models[0].encoding, words, np.concatenate([view.recovered for view in seen])) for seen in views
    ]
    names = titles(models)
    print_bias(names, tables, len(words), len(read))
    flags = frozen.frozen_notes(models[0].path.parent, read[0])
    scores = views[0][0].scores
    if flags is not None:
        print(f"frozen in {read[0].file} by this run: {flags.mean():.1%} of the notes")
    elif scores is not None:
        print("frozen notes: this run's mask book does not know the piece; the picture marks what would be frozen")
    if args.out:
        first = [seen[0] for seen in views]
        compared = list(zip(names, models, first, tables, strict=True))
        inspection_page.draw(compared, read[0], flags, args.out)
        print(f"picture: {args.out}")
    return 0


def convert(args: Namespace) -> int:
    """`amb convert`: published weights to a checkpoint, or back; a checkpoint to one of half the size."""
    from amb import checkpoint, published

    source = checkpoint.find(args.source)
    check_out(args.out, source)
    ways = {"checkpoint": published.convert, "published": published.export, "half": checkpoint.halve}
    ways[args.to](source, args.out)
    print(published.describe(args.out))
    return 0


def info(args: Namespace) -> int:
    """`amb info`: what a file is."""
    from amb import checkpoint, published

    print(published.describe(checkpoint.find(args.checkpoint)))
    return 0


def save(midi, out: Path) -> None:
    """Write a MIDI file, whole or not at all."""
    from amb import checkpoint

    with checkpoint.writing(out) as file:
        midi.save(file=file)
