"""Open-Qwen2VL: a compute-efficient vision-language model (arXiv 2504.00595)."""
