"""A causal language model alone."""
