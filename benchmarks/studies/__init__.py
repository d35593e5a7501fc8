"""Small experiments, one module each with a `STUDY`; run by `python -m benchmarks.study NAME`, rows kept beside."""
