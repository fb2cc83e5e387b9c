"""The hot operations of the model, one file each: read the reference first, then the Triton kernels beside it.

| operation | file | what it computes |
|---|---|---|
| `relative_attention` | attention.py | softmax attention with query- and key-side relative positions |
| `compound_embedding` | embedding.py | sum of F table rows per note, LayerNorm, dropout |
| `residual_layer_norm` | layer_norm.py | LayerNorm(x + dropout(y)) |
| `masked_lm` | masked_lm.py | F output layers and their weighted cross-entropy |
| `adversarial_sample` | sampling.py | choose, corrupt and record the notes to recover |

Every operation takes `implementation=None | "reference" | "cpu" | "triton"`; dispatch.py resolves None. The package
depends on torch and triton only, and contains nothing of music. `python -m benchmarks kernels` measures its kernels.
"""

from .attention import relative_attention
from .embedding import compound_embedding
from .layer_norm import residual_layer_norm
from .masked_lm import MaskedLM, masked_lm
from .sampling import Sample, adversarial_sample, selected_counts, top_k
