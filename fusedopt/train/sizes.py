"""How large a run is unless the user says otherwise: by task, and by what it runs on."""

from __future__ import annotations

from typing import Any

SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "text": {
        "cpu": dict(hidden_size=128, num_layers=4, num_heads=4, max_seq_len=128, batch_size=16, steps=1000),
        "gpu": dict(
            hidden_size=512, num_layers=8, num_heads=8, max_seq_len=512, batch_size=64, steps=2000, dropout=0.1
        ),
        "interpreter": dict(hidden_size=32, num_layers=2, num_heads=2, max_seq_len=32, batch_size=8, steps=100),
    },
    "translate": {
        "cpu": dict(hidden_size=128, num_layers=2, num_heads=4, max_seq_len=64, batch_size=32, steps=1500),
        "gpu": dict(hidden_size=256, num_layers=4, num_heads=8, max_seq_len=128, batch_size=64, steps=2000),
        "interpreter": dict(hidden_size=32, num_layers=1, num_heads=2, max_seq_len=32, batch_size=8, steps=50),
    },
}
COMMON: dict[str, dict[str, Any]] = {
    "text": dict(dropout=0.0, label_smoothing=0.0, tokenizer="bytes", vocabulary_size=0),
    "translate": dict(dropout=0.1, label_smoothing=0.1, tokenizer="bpe", vocabulary_size=2000),
}


def default_sizes(task: str, device: str, backend: str) -> dict[str, Any]:
    """The settings of `SIZES` for a task on a device; "triton" without a GPU is the interpreter."""
    machine = "gpu" if device != "cpu" else "interpreter" if backend == "triton" else "cpu"
    return {**COMMON[task], **SIZES[task][machine]}
