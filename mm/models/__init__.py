"""Encoders, connectors, backbones and the systems composed of them. Single device, no trainer, no parallelism.

A system takes a `PackedBatch` and returns an `Output`: sums of losses, with the counts that they are to be divided by.
"""
