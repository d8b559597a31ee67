"""`fusedopt train`: a small Transformer on real text, trained with one of our optimizers.

Where to look: `command.py` and `options.py` the command line, `settings.py` and `settings_file.py` what it asks for,
`config.py`, `sizes.py` and `checks.py` settings, defaults and what cannot work, `job.py` everything checked before the
start, `session.py` a run without a terminal; `task.py` what a task is: `text.py` with `data.py` and `model.py`, and
`translate/`; `optimizers.py` optimizer and schedule, `trainer.py` one training step, `loop.py` the run, `stopping.py`
and `best.py` early stopping, `parallel.py` several processes, `checkpoint.py` save and resume, `sharded.py` the same in
parts, `metrics.py` the log, `summary.py`, `progress.py` and `plot.py` what a person sees.
"""
