"""What a run writes down: metrics.jsonl, one object a logged step, and the same numbers for TensorBoard."""

import json
import math
from pathlib import Path
from typing import Any


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl; a last line that a kill cut short is left out."""
    rows = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


class MetricsLog:
    """Appends to `metrics.jsonl` and TensorBoard files of a run folder, from `step` on: what came later is cut back."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(path) if row["step"] <= step]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(_line(row) for row in kept))
        partial.replace(path)
        self._file = open(path, "a")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(_line(row))
        self._file.flush()
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self._board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self._file.close()
        self._board.close()


def _line(row: dict[str, Any]) -> str:
    # JSON has no NaN: a loss that is not finite is written as null.
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(plain, ensure_ascii=False) + "\n"
