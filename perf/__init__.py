"""Measurements. Nothing here is a test: clocks are read as ratios within one run, beside a check of the results.

    python -m perf.eager_cpu     the eager backend against torch.optim on CPU tensors
    python -m perf.host_time     Python time of a step on tiny tensors, launches recorded instead of run

Run them from the checkout. What was found, and on which machine, stands in ``notes/``.
"""
