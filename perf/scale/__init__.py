"""A training step on many GPUs, on paper: ``python -m perf.scale`` writes ``fusedopt/docs/scale.md``.

Bytes are exact: ``fusedopt.memory.per_rank``. Times are predicted: by `perf.predict` for the step of a rank's shards,
corrected by rows of a GPU where there are any (``measured.py``), and by `cluster.Cluster` for what goes between the
GPUs. Host time over DTensors is measured, by ``sharded.py``.
"""
