"""`fusedopt tune`: hyper-parameter search with Optuna over runs of `fusedopt train`.

Where to look: `command.py` and `names.py` the options, `plan.py` what a study is, `space.py` what is searched,
`samplers.py` how (`swarm.py` by particle swarm), `study.py` the study's folder and its locks, `worker.py` one trial
after another, `training.py` what that is made of, `team.py` several workers, `report.py` and `plot.py` what a person
sees.
"""
