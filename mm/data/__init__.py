"""Samples, packing and loading: raw shards in, `PackedBatch` out. Knows nothing of models.

    shards.py  ->  sources.py  ->  tokens.py  ->  plan.py (pack.py)  ->  packed.py  ->  loader.py  ->  batch.py
    tar members    Sample          Segment        which go together      tars on disk   order, resume  PackedBatch

`layout.py` is what these steps must know of a model: tokenizer, template, and how many positions a picture takes.
"""
