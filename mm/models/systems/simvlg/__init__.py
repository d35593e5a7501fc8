"""SimVLG, also EVL_Gen: a frozen language model that reads pictures through merging tokens (arXiv 2310.03291)."""
