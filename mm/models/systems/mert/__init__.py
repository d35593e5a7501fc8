"""MERT: acoustic music understanding by masked prediction of a teacher's codes (arXiv 2306.00107)."""
