"""`fusedopt verify`: every rule, dtype, format and backend of this machine against an oracle in higher precision.

Where to look: what a rule should compute, `oracles/`; which data it is tried on, `problem.py`; how a step is run,
`subjects.py`; how an error is measured and judged, `measure.py` and `bounds.py`; formats of state and weights,
`storage.py` and `kept*.py`; a rule of the user's own, `own.py`; the program, `command.py`.
"""
