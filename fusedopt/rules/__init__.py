"""Update rules, one file each. Importing this package imports no rule, no Triton, and fixes no mode."""

RULES: dict[str, str] = {
    "adadelta": "Adadelta",
    "adafactor": "Adafactor",
    "adagrad": "Adagrad",
    "adam": "Adam",
    "adamax": "Adamax",
    "adamw": "AdamW",
    "adan": "Adan",
    "ademamix": "AdEMAMix",
    "adopt": "ADOPT",
    "asgd": "ASGD",
    "lamb": "LAMB",
    "lars": "LARS",
    "lion": "Lion",
    "muon": "Muon",
    "nadam": "NAdam",
    "novograd": "NovoGrad",
    "radam": "RAdam",
    "rmsprop": "RMSprop",
    "rprop": "Rprop",
    "schedule_free_adamw": "AdamWScheduleFree",
    "schedule_free_sgd": "SGDScheduleFree",
    "sgd": "SGD",
    "sparse_adam": "SparseAdam",
    "stable_adamw": "StableAdamW",
}
"""Rule name (= file name) → public class name."""
