"""One folder a system: `config.py` (its section, its layout; no torch) and `model.py` (the composition)."""
