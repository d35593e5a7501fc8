"""Data sets small enough to ship inside the package, so that examples and tests run offline."""

from pathlib import Path

_HERE = Path(__file__).parent


def folder(name: str) -> Path:
    """Return the folder of the shipped data set `name`, such as "emoji"."""
    names = sorted(path.parent.name for path in _HERE.glob("*/manifest.json"))
    if name not in names:
        raise ValueError(f"no shipped data set is called {name!r}; there are: {', '.join(names) or 'none'}")
    return _HERE / name
