"""Measurements. Nothing here is a test: clocks are read as ratios within one run, beside a check of the results.

    python -m perf               with a GPU: times of everybody's steps; without: what can be known without one
    python -m perf --all         on a rented GPU: tests, sanitizer, tuning and measurements in so many --minutes
    python -m perf --compare A B what got worse from one results file to another
    python -m perf.report FILES  tables and plots; --readme: the README's too
    python -m perf.tune          launch shapes, measured or from the disassembly
    python -m perf.host_time     host time of more rules and options

Where to look: ``cases.py`` what is stepped, ``work.py`` what is done, ``contenders/`` by whom, ``check.py`` whether it
is right, ``clock.py`` and ``measure.py`` how it is timed, ``run.py`` in which order, ``results.py`` what a row holds;
``code.py``, ``host.py`` and ``predict/`` what is known without a GPU; ``stages/`` the first step, a training step and
the sanitizer, ``studies/`` single questions (what formats lose, drift, memory of released gradients), each a command,
``python -m perf.studies.NAME``. Run from the checkout. What was found, and on which machine, stands in ``notes/``.
"""
