"""mm: multimodal pre-training from configs.

`import mm` is light: nothing here imports torch. `mm.load(run, checkpoint or release)` does, when it is called.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mm.hub import load as load

__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from mm.hub import load

        return load
    raise AttributeError(f"module 'mm' has no attribute {name!r}")
