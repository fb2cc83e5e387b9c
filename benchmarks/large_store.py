"""Training on a token store of 100 million notes: how soon it starts, what it keeps in memory, what a batch costs.

    python -m benchmarks scale --store [--notes 100000000] [--steps 40] [--data PATH] [--folder FOLDER] [--out FILE]

The store is made for the purpose: pieces of the demo corpus (or of `--data`) again and again, each transposed at
random, written as they come; 16 bytes a note in a temporary folder, removed afterwards. train.py then runs on it as
a process of its own, `tiny`, and on a store of 100,000 notes before, and both are watched: seconds from the start of
the process to the first line of metrics.jsonl (`--log-every 1`), and its resident memory, sampled from /proc, in all
and what is not of files. Then, in this process: notes per second of making batches (`Sequences.batch`, `transpose`)
from the large store, beside those of a step, for `small` and `base`.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from amb import data, mask_book, tokenizer
from amb.config import PRESETS, Config
from benchmarks.inputs import filled_sequences, open_corpus, preset_batch
from benchmarks.step import model_of, step_of
from benchmarks.timing import spread, take_turns, write

REPOSITORY = Path(__file__).parent.parent
SMALL = 100_000  # notes of the store to compare with
FOUND = ("VmRSS", "RssAnon", "RssFile")


def write_store(source: tokenizer.Store, out: Path, notes: int, seed: int = 0) -> None:
    """A store of at least `notes` notes: pieces of `source` at random, transposed, in bounded memory."""
    encoding, rng = tokenizer.load(source.encoding), np.random.default_rng(seed)
    segments_of = np.searchsorted(source.segments[:, 0], [piece.offset for piece in source.pieces])
    ends = np.append(segments_of[1:], len(source.segments))
    pieces, written = [], 0
    out.mkdir(parents=True)
    with open(out / "words.bin", "wb") as words:
        while written < notes:
            index = int(rng.integers(len(source.pieces)))
            piece = source.pieces[index]
            own = np.asarray(source.words[piece.offset : piece.offset + piece.notes])[None].astype(np.int64)
            words.write(data.transpose(own, encoding, 11, rng.random(1))[0].astype("<u2").tobytes())
            lengths = source.segments[segments_of[index] : ends[index], 1].tolist()
            path = f"{len(pieces) // 1000:04}/{len(pieces):07}.mid"
            pieces.append({"source": 0, "path": path, "segments": lengths})
            written += piece.notes
    meta = json.loads((source.path / "store.json").read_text())
    (out / "store.json").write_text(json.dumps(meta | {"sources": [str(source.path)], "pieces": pieces}) + "\n")


def watch_training(store: Path, run: Path, steps: int) -> dict:
    """Run train.py on a store: seconds to the first step, steps per second after it, and peaks of resident memory."""
    command = [
        sys.executable, "train.py", "--config", "tiny", "--data", store, "--out", run, "--epochs", "1",
        "--epoch-size", str(4 * steps), "--valid-size", "64", "--freeze-every", "0", "--log-every", "1",
    ]  # fmt: skip
    began, first, peaks, at_first = time.perf_counter(), None, dict.fromkeys(FOUND, 0), {}
    with subprocess.Popen(
        list(map(str, command)), cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        while process.poll() is None:
            now = resident(process.pid)
            peaks = {name: max(peaks[name], now.get(name, 0)) for name in FOUND}
            metrics = run / "metrics.jsonl"
            if first is None and metrics.exists() and metrics.stat().st_size:
                first, at_first = time.perf_counter() - began, now
            time.sleep(0.02)
        problem = process.stderr.read().decode()
    if process.returncode or first is None:
        raise SystemExit(f"train.py failed on {store}:\n{problem[-2000:]}")
    return {
        "seconds_to_first_step": first,
        "seconds": time.perf_counter() - began,
        "peak_bytes": peaks,
        "bytes_at_first_step": at_first,
    }


def resident(process: int) -> dict[str, int]:
    """Bytes of memory that a process has resident, by kind; nothing if it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines)
    return {name: 1024 * int(value.split()[0]) for name, value in pairs if name in FOUND}


def batches_beside_steps(store: tokenizer.Store, name: str, rounds: int, device: torch.device) -> dict:
    """Notes per second of making a preset's batches from the whole of a store, and of its training steps."""
    config, batch = Config(**PRESETS[name]), preset_batch(name, device)
    encoding, rng = tokenizer.load(store.encoding), np.random.default_rng(0)
    sequences = data.cut([store], [["train"] * len(store.pieces)], "train", config.notes)
    rates = []
    for _ in range(20):
        numbers = rng.integers(len(sequences), size=config.batch)
        began = time.perf_counter()
        words, lengths = sequences.batch(numbers)
        data.transpose(words, encoding, config.transpose, rng.random(len(words)))
        rates.append(int(lengths.sum()) / (time.perf_counter() - began))
    words, lengths = (torch.from_numpy(x).to(device) for x in filled_sequences(store, config.notes, batch))
    step = take_turns({"step": step_of(model_of(config, device), words, lengths, config)}, rounds, device)["step"]
    per_second = [words.shape[:2].numel() / step["seconds"][end] for end in ("median", "highest", "lowest")]
    return {
        "batches_notes_per_second": spread(rates),
        "step_notes_per_second": dict(zip(("median", "lowest", "highest"), per_second, strict=True)),
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks scale --store", description=__doc__.splitlines()[0])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--notes", type=int, default=100_000_000)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=2, help="of the steps beside the batches")
    parser.add_argument("--configs", nargs="*", choices=PRESETS, default=("small", "base"), help="for those steps")
    parser.add_argument("--data", type=Path, help="a token store or folder of MIDI (default: the demo corpus)")
    parser.add_argument("--folder", type=Path, help="where the store is put for the while (default: the system's)")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results" / f"store-{device.type}.json")
    options = parser.parse_args(arguments)
    results = {"asked": options.notes}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        large, small = Path(folder, "large"), Path(folder, "small")
        with open_corpus(options.data, pieces=160) as source:
            began = time.perf_counter()
            write_store(source, large, options.notes)
            results["written_seconds"] = time.perf_counter() - began
            results["writer_peak_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            write_store(source, small, min(SMALL, options.notes))
        for name, store in (("small", small), ("large", large)):
            written = tokenizer.open_store(store)
            about = {"notes": len(written.words), "pieces": len(written.pieces), "segments": len(written.segments)}
            size = sum(file.stat().st_size for file in store.iterdir())
            results[name] = (
                about | {"store_bytes": size} | watch_training(store, Path(folder, f"run-{name}"), options.steps)
            )
            peak = results[name]["peak_bytes"]
            print(
                f"{about['notes']:,} notes in {about['pieces']:,} pieces: first step after "
                f"{results[name]['seconds_to_first_step']:.1f} s; peak {peak['VmRSS'] / 1e6:,.0f} MB resident, "
                f"{peak['RssAnon'] / 1e6:,.0f} MB of it not of files"
            )
        tiny = Config(**PRESETS["tiny"])
        opened = tokenizer.open_store(large)
        sequences = data.cut([opened], [["train"] * len(opened.pieces)], "train", tiny.notes)
        book = mask_book.empty_book(len(sequences), tiny.notes)
        results["book_bytes_per_note"] = book.numel() / int(sequences.lengths.sum())
        results["book_bytes_per_place"] = book.numel() / (len(sequences) * tiny.notes)
        print(f"mask book: {8 * results['book_bytes_per_place']:.2f} bits a place of a sequence, PAD included")
        results["batches"] = {}
        for name in options.configs:
            rates = results["batches"][name] = batches_beside_steps(opened, name, options.rounds, device)
            made, used = (rates[kind]["median"] for kind in ("batches_notes_per_second", "step_notes_per_second"))
            print(f"{name}: batches {made:,.0f} notes/s, a step {used:,.0f}: {used / made:.2%} of a step's time")
            write(options.out, results)
    write(options.out, results)
    print(options.out)
