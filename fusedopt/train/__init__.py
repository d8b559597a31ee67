"""`fusedopt train`: a small decoder-only Transformer on real text, trained with one of our optimizers.

Where to look: `command.py` the options, `config.py` their defaults and checks, `data.py` the text, `model.py` the
network, `optimizers.py` optimizer and schedule, `trainer.py` one training step, `loop.py` the run, `checkpoint.py`
save and resume, `metrics.py` the log, `progress.py` and `plot.py` what a person sees.
"""
