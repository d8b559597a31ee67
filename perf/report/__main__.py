"""`python -m perf.report`."""

from perf.report import main

main()
