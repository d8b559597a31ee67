"""`fusedopt memory` and its Python form: what training holds on the device, counted without allocating it.

The optimizer itself makes its state over meta tensors, which have shapes but no memory; `held.py` adds up what it
made, so no format is described twice; `ranks.py` does so for one rank of many. Formats of others: `rivals.py`; model
shapes: ``fusedopt/shapes.py``.
"""

from .held import Memory, estimate
from .ranks import Ranks, per_rank

__all__ = ["Memory", "Ranks", "estimate", "per_rank"]
