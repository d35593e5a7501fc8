"""Several systems in one run."""
