"""Adversarial-MidiBERT. To use a trained model from Python:

    import amb

    model = amb.load("runs/composer")                   # a run folder or a checkpoint file; CPU or GPU
    for piece in model.predict("my/midi"):              # files and folders; see `Prediction`
        print(piece.file, piece.label, piece.probabilities, piece.error)
    embeddings = model.embed(["a.mid", "my/midi"])      # see `Embeddings`
    embeddings.names, embeddings.vectors                # list of P names, float32 [P, d]
    piece = model.encode("a.mid")                       # words, and the note that each one stands for; see `Piece`

The same from a shell: `amb --help`. Importing `amb` alone is cheap: torch is imported by `load`.
"""

import os

# In a checkout, kernels/ and tokenizer/ lie beside amb/; installed, they lie in it (setup.py).
if not os.path.isdir(os.path.join(__path__[0], "kernels")):
    __path__.append(os.path.dirname(__path__[0]))


def load(path, device=None, dtype=None):
    """The trained model in a checkpoint file or a run folder, ready for inference: `amb.inference.Trained`.

    `device`: "cpu", "cuda", "cuda:1" …; by default the GPU if there is one. `dtype`: "fp32", "bf16", or "auto", what
    training would choose for the device; by default that on a GPU and fp32 on a CPU. Raises ValueError, one line that
    names the file, if it is no checkpoint.
    """
    from amb import inference

    return inference.load(path, device, dtype)
