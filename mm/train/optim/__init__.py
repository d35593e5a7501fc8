"""Optimizers: torch's by name, and those that torch has not. One file each; `config.py` is the section."""
