"""Several systems in one run: each runs on the rows of the batch that hold its media, and none knows of the others.

Every part runs on every micro-batch, where need be on a row of padding: so weights that are in parts over ranks are
gathered in step whatever rows a rank has, and a part that a step has nothing for still gets a gradient, of zero.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mm.data.batch import IGNORE, PackedBatch, collate, select_rows, with_dummies
from mm.data.loader import EMPTY
from mm.errors import ConfigError, DataError
from mm.models.system import Output, PooledSystem, System
from mm.models.systems.joint.config import JointConfig, reads_text

PADDING = 8
"""Positions of the row of a part that has none."""


class Joint(System):
    """See the module. The submodules are the parts, by their names; objectives and metrics are `PART/NAME`."""

    def __init__(self, config: JointConfig, weights: bool = True) -> None:
        super().__init__()
        self.names = list(config.parts)
        self.weights = {}
        self._layouts = {name: part.layout() for name, part in config.parts.items()}
        self._owners = {medium: name for name, layout in self._layouts.items() for medium in layout.media()}
        self._reading = next((name for name, layout in self._layouts.items() if reads_text(layout)), None)
        self._padding = {}
        for name, section in config.parts.items():
            if hasattr(type(self), name) or name in vars(self):
                raise ConfigError(f"model.parts.{name}: a torch module has something else of that name; choose another")
            part: System = section.build(weights)
            if isinstance(part, PooledSystem):
                raise ConfigError(
                    f"model.parts.{name}: a {section.kind} model has objectives over all items of a step; "
                    "a joint run has none such"
                )
            self.add_module(name, part)
            factor = config.weights.get(name, 1.0)
            self.weights |= {f"{name}/{objective}": factor * weight for objective, weight in part.weights.items()}
            layout = self._layouts[name]
            with torch.device("cpu"):  # also where the model is made without memory
                self._padding[name] = with_dummies(collate([EMPTY], layout, PADDING), layout)

    @property
    def learned(self) -> tuple[str, ...]:
        return tuple(f"{name}/{objective}" for name in self.names for objective in self.part(name).learned)

    def counted_by(self, metric: str) -> str:
        name, _, its = metric.partition("/")
        return f"{name}/{self.part(name).counted_by(its)}"

    def scores(self, predictions: dict[str, Tensor]) -> dict[str, float]:
        found: dict[str, float] = {}
        for name in self.names:
            its = {key.removeprefix(f"{name}/"): one for key, one in predictions.items() if key.startswith(f"{name}/")}
            found |= {f"{name}/{key}": value for key, value in self.part(name).scores(its).items()} if its else {}
        return found

    def part(self, name: str) -> System:
        found = getattr(self, name)
        assert isinstance(found, System)
        return found

    def begin_step(self, step: int, steps: int) -> None:
        for name in self.names:
            self.part(name).begin_step(step, steps)

    def adopt(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name in self.names:
            own = {key.removeprefix(f"{name}."): one for key, one in tensors.items() if key.startswith(f"{name}.")}
            found |= {f"{name}.{key}": one for key, one in self.part(name).adopt(own).items()}
        return {key: one for key, one in tensors.items() if key.partition(".")[0] not in self.names} | found

    def counts(self, batch: PackedBatch) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, rows in self.rows(batch).items():
            counts = self.part(name).counts(self._share(batch, name, rows))
            found |= {f"{name}/{objective}": number for objective, number in counts.items()}
        return found

    @property
    def teachers(self) -> Sequence[nn.Module]:
        return [teacher for name in self.names for teacher in self.part(name).teachers]

    def row_counts(self, batch: PackedBatch) -> Tensor:
        """Of the first objective of the part that has a row."""
        found = torch.zeros(len(batch.ids), dtype=torch.int64)
        for name, rows in self.rows(batch).items():
            if rows:
                found[rows] = self.part(name).row_counts(self._share(batch, name, rows)).cpu()
        return found

    def forward(self, batch: PackedBatch) -> Output:
        whole = Output({}, {})
        by_row = torch.zeros(len(batch.ids), device=batch.input_ids.device)
        for name, rows in self.rows(batch).items():
            output: Output = self.part(name)(self._share(batch, name, rows))
            for ours, its in (
                (whole.losses, output.losses), (whole.counts, output.counts), (whole.metrics, output.metrics),
                (whole.metric_counts, output.metric_counts), (whole.predictions, output.predictions),
            ):  # fmt: skip
                ours.update({f"{name}/{key}": value for key, value in its.items()})
            if rows and output.rows:
                own = next(iter(output.rows.values())).to(by_row)
                by_row = by_row.index_copy(0, torch.tensor(rows, device=by_row.device), own)
        whole.rows[next(iter(self.weights))] = by_row
        return whole

    @property
    def drawn(self) -> tuple[str, ...]:
        return tuple(f"{name}/{objective}" for name in self.names for objective in self.part(name).drawn)

    def drawn_losses(self, batch: PackedBatch, generators: Sequence[torch.Generator]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, rows in self.rows(batch).items():
            # A row of padding draws nothing.
            own = [generators[row] for row in rows] or [torch.Generator(batch.input_ids.device)]
            losses = self.part(name).drawn_losses(self._share(batch, name, rows), own)
            found |= {f"{name}/{objective}": loss for objective, loss in losses.items()}
        return found

    def rows(self, batch: PackedBatch) -> dict[str, list[int]]:
        """The rows of each part: those that hold its media, and those without media where it reads text.

        Raises:
            DataError: a row is for two parts, or has text to be learned and media of a part that reads none.
        """
        takers: list[set[str]] = [set() for _ in batch.ids]
        for medium, media in batch.media.items():
            for row in () if media.dummy else media.row.tolist():
                takers[row].add(self._owners[medium])
        found: dict[str, list[int]] = {name: [] for name in self.names}
        for row, learned in enumerate((batch.labels != IGNORE).any(1).tolist()):
            names = takers[row]
            if self._reading is not None and (learned or not names):
                names.add(self._reading)
            if len(names) > 1:
                raise DataError(
                    f"{batch.ids[row][0]}: its row is for {' and '.join(sorted(names))} at once; in a joint run a "
                    "source holds what one of model.parts takes, and nothing else"
                )
            for name in names:
                found[name].append(row)
        return found

    def _share(self, batch: PackedBatch, name: str, rows: list[int]) -> PackedBatch:
        """What a part sees of a batch."""
        if not rows:
            return self._padding[name].to(batch.input_ids.device)
        return with_dummies(select_rows(batch, rows), self._layouts[name])
