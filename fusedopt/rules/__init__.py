"""Update rules, one file each. Importing this package imports no rule, no Triton, and fixes no mode."""

RULES: dict[str, str] = {"adam": "Adam", "adamw": "AdamW", "sgd": "SGD"}
"""Rule name (= file name) → public class name."""
