"""Samples, packing and loading: raw shards in, `PackedBatch` out. Knows nothing of models.

    shards.py, tables.py -> sources.py -> tokens.py -> scan.py -> plan.py (pack.py) -> write.py, packed.py
    members, rows           Sample        Segment      on disk    which go together    packed shards
        -> loader.py (mixture.py, workers.py) -> batch.py
           order, resume                         PackedBatch

`prepare.py` runs the steps up to packed shards. `layout.py` is what they must know of a model: tokenizer, template, and
how many positions media take.
"""
