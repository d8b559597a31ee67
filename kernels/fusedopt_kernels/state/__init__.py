"""State formats, one file each. A codec is a flat tuple ``(load, store, type)``; see ``wide.py`` for the contract."""
