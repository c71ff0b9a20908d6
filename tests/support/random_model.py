"""Makes a small OLMo 2 of random weights in a folder: a model to try the steps of docs/adding-models.md on."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from support import tiny_models

OLMO2 = {
    "model_type": "olmo2",
    "hidden_size": 160,
    "num_hidden_layers": 3,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 80,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}

if __name__ == "__main__":
    print(tiny_models.write(Path(sys.argv[1]).expanduser(), OLMO2))
