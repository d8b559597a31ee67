"""`python -m perf.tune`."""

from perf.tune import main

main()
