"""Gradient transforms, one file each, applied in the order of a step; see ``coefficient.py`` for the contract."""
