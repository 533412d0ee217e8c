"""Of every row the smallest entries, kept while a matrix passes by in tiles: in C++ on the CPU, else by torch.topk."""

import torch
from torch import Tensor

from sabmn_ext import _native
from sabmn_ext.ops import dispatch

_GROUP = 16  # columns, see _extremes

dispatch.register("keep_smallest", cpu=dispatch.native_cpu(torch.float32))


class Smallest:
    """Of every row the ``count`` columns with the smallest ``sign · entry + offset`` of all tiles so far, in any order.

    Ties at the border: any of them.
    """

    def __init__(self, rows: int, count: int, sign: float, device: torch.device) -> None:
        self.sign, self._filled = sign, 0
        self._values = torch.empty(rows, count, dtype=torch.float64, device=device)
        self._items = torch.empty(rows, count, dtype=torch.int64, device=device)

    @property
    def values(self) -> Tensor:
        """[rows, min(count, columns so far)] float64."""
        return self._values[:, : self._filled]

    @property
    def items(self) -> Tensor:
        """[rows, min(count, columns so far)] int64."""
        return self._items[:, : self._filled]

    def add(self, tile: Tensor, offsets: Tensor, first_item: int) -> None:
        """tile: [rows, columns] float32, column j is item ``first_item`` + j; offsets: [rows] float64."""
        count, before = self._values.shape[1], self._filled
        self._filled = min(count, before + tile.shape[1])
        if dispatch.choose("keep_smallest", None, tile.device, tile.dtype) == "cpu":
            module, tile, offsets = _native.module, tile.contiguous(), offsets.contiguous()
            assert module is not None
            kept = (self._values.data_ptr(), self._items.data_ptr(), len(tile), count, before)
            given = (tile.data_ptr(), offsets.data_ptr(), tile.shape[1], first_item)
            status = module.keep_smallest(kept, given, self.sign, torch.get_num_threads())
            dispatch.check_status(status, "keep_smallest", tile)
            return
        values, items = _extremes(tile, min(count, tile.shape[1]), largest=self.sign < 0)
        values, items = self.sign * values.double() + offsets[:, None], items + first_item
        values = torch.cat((self._values[:, :before], values), 1)
        items = torch.cat((self._items[:, :before], items), 1)
        values, chosen = values.topk(self._filled, largest=False, sorted=False)
        self._values[:, : self._filled], self._items[:, : self._filled] = values, items.gather(1, chosen)


def _extremes(rows: Tensor, count: int, *, largest: bool) -> tuple[Tensor, Tensor]:
    """The ``count`` smallest, or largest, entries of each row, and their columns, in any order.

    Of groups of columns, those with the ``count`` smallest minima hold them; most entries are only read for that.
    """
    width, num_groups = rows.shape[1], rows.shape[1] // _GROUP
    if width % _GROUP or num_groups < 2 * count:
        return rows.topk(count, largest=largest, sorted=False)
    groups = rows.view(len(rows), _GROUP, num_groups)  # group g: the columns g, g + num_groups, …
    best = groups.amax(dim=1) if largest else groups.amin(dim=1)
    chosen = best.topk(count, largest=largest, sorted=False).indices  # [rows, count]
    steps = torch.arange(0, width, num_groups, device=rows.device)
    columns = (chosen[:, :, None] + steps).flatten(1)  # [rows, count · _GROUP]
    values, where = rows.gather(1, columns).topk(count, largest=largest, sorted=False)
    return values, columns.gather(1, where)
