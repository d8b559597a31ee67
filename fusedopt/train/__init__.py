"""`fusedopt train`: a small decoder-only Transformer on real text, trained with one of our optimizers.

Where to look: `command.py` the options, `config.py` their defaults and checks, `job.py` everything checked before the
start, `data.py` the text, `model.py` the network, `optimizers.py` optimizer and schedule, `trainer.py` one training
step, `loop.py` the run, `parallel.py` several processes, `checkpoint.py` save and resume, `sharded.py` the same in
parts, `metrics.py` the log, `progress.py` and `plot.py` what a person sees.
"""
