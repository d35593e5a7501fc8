"""MoMa: early-fusion pre-training with modality-aware experts (arXiv 2407.21770)."""
