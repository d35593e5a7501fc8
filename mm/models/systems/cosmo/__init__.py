"""COSMO: contrastive and generative, on interleaved data, with gated cross-attention (arXiv 2401.00849)."""
