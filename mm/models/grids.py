"""Pictures of any grid, their patches one after the other in one flat tensor.

Nothing is padded: what works on whole grids (position embeddings, pooling) is called once for all pictures of a grid,
which changes no result; what has sharded weights sees the flat tensor, so it runs as often whatever the grids are.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Grid = tuple[int, int]
"""(rows, columns) of patches."""


def each_grid(run: Callable[[Tensor], Tensor], patches: Tensor, grids: Sequence[Grid]) -> Tensor:
    """What `run` makes of every picture, flat and in their order.

    Args:
        run: [n, rows, columns, D] of n pictures of one grid to [n, t, …]; t may depend on the grid.
        patches: [sum rows * columns, D], row by row of each grid.

    Returns:
        [sum t, …].
    """
    alike: dict[Grid, list[int]] = defaultdict(list)
    for number, grid in enumerate(grids):
        alike[grid].append(number)
    if len(alike) == 1:
        return run(patches.view(len(grids), *grids[0], -1)).flatten(0, 1)
    pieces = list(patches.split([rows * columns for rows, columns in grids]))
    for grid, numbers in alike.items():
        made = run(torch.stack([pieces[number] for number in numbers]).unflatten(1, grid))
        for number, piece in zip(numbers, made, strict=True):
            pieces[number] = piece
    return torch.cat(pieces)
