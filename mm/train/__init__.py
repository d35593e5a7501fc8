"""The trainer: PackedBatches and a System in, checkpoints and numbers out."""
