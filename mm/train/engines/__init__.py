"""Engines: where weights, gradients and optimizer state live, and who reduces them. One file each."""
