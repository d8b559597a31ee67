"""Studies of single questions, each a command, ``python -m perf.studies.NAME``; the answers stand in ``../notes/``.

``losses``, ``drift``: what formats lose. ``state_formats``: which codes keep state best. ``release``: memory.
"""
