"""`python -m mm …` is `mm …` (torchrun needs a module to run)."""

from mm.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
