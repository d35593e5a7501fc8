"""Masked language models: encoders that predict the tokens that they do not see (BERT, 1810.04805)."""
