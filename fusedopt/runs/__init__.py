"""`fusedopt runs`: past runs side by side, what differs between some, and a new run from an old one.

Where to look: `folders.py` what is read of a run's folder, `selection.py` sorting and filters, `table.py` the list,
`diff.py` and `plot.py` some runs in detail, `start.py` a new run, `command.py` the options. Only `start.py` imports
torch: a list of runs is there at once.
"""
