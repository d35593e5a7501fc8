"""A VQ model: pictures as a grid of codes, and back (1711.00937)."""
