"""Of every row the smallest entries, kept while a matrix passes by in tiles: in C++ on the CPU, else by torch.topk."""

import torch
from torch import Tensor

from sabmn_ext import _native
from sabmn_ext.ops import dispatch
from sabmn_ext.ops.retrieval import METRICS, _fields, _workspace

_GROUP = 16  # columns, see _extremes

dispatch.register("keep_smallest", cpu=dispatch.native_cpu(torch.float32))
dispatch.register("rank_kept", cpu=dispatch.native_cpu(*dispatch.DTYPE_CODES))


class Smallest:
    """Of every row the ``count`` columns with the smallest ``sign · entry + offset`` of all tiles so far, in any order.

    Ties at the border: any of them.
    """

    def __init__(self, rows: int, count: int, sign: float, device: torch.device) -> None:
        self.sign, self._count, self._seen = sign, count, 0
        room = 2 * count + _GROUP if device.type == "cpu" else count  # csrc/retrieval/nearest_cpu.cpp
        self._values = torch.empty(rows, room, dtype=torch.float64, device=device)
        self._items = torch.empty(rows, room, dtype=torch.int64, device=device)
        self._limits = torch.full((rows,), torch.inf, dtype=torch.float64, device=device)
        self._filled = torch.zeros(rows, dtype=torch.int64, device=device)

    @property
    def values(self) -> Tensor:
        """[rows, min(count, columns so far)] float64."""
        return self._settled(self._values)

    @property
    def items(self) -> Tensor:
        """[rows, min(count, columns so far)] int64."""
        return self._settled(self._items)

    def add(self, tile: Tensor, offsets: Tensor, first_item: int, *, transposed: bool = False) -> None:
        """tile: [rows, columns] float32, column j is item ``first_item`` + j; offsets: [rows] float64.

        ``transposed``: the tile's columns are what are rows here, and its row i is item ``first_item`` + i.
        """
        before, (rows, columns) = min(self._count, self._seen), tile.shape
        self._seen += rows if transposed else columns
        if dispatch.choose("keep_smallest", None, tile.device, tile.dtype) == "cpu":
            module, tile, offsets = _native.module, tile.contiguous(), offsets.contiguous()
            assert module is not None
            given = (tile.data_ptr(), offsets.data_ptr(), rows, columns, first_item)
            keep = module.keep_smallest_of_columns if transposed else module.keep_smallest_of_rows
            status = keep(self._fields(), given, self.sign, torch.get_num_threads())
            dispatch.check_status(status, "keep_smallest", tile)
            return
        if transposed:
            bounds = (self.sign * tile.double() + offsets[:, None]).T
            values, items = bounds.topk(min(self._count, rows), largest=False, sorted=False)
        else:
            values, items = _extremes(tile, min(self._count, columns), largest=self.sign < 0)
            values = self.sign * values.double() + offsets[:, None]
        values = torch.cat((self._values[:, :before], values), 1)
        items = torch.cat((self._items[:, :before], items + first_item), 1)
        filled = min(self._count, self._seen)
        values, chosen = values.topk(filled, largest=False, sorted=False)
        self._values[:, :filled], self._items[:, :filled] = values, items.gather(1, chosen)

    def rank(self, query: Tensor, gallery: Tensor, metric: str, slack: float, k: int) -> tuple[Tensor, Tensor]:
        """The ``k`` smallest of what is kept by ``sign`` · exact distance, ties to the lower item: both [rows, k].

        query: [rows, D]; slack: an item whose value is above the k-th smallest by more than this is none of them.
        Call it once: what is kept is spent.
        """
        if dispatch.choose("rank_kept", None, query.device, query.dtype) == "cpu":
            assert _native.module is not None
            self._settled(self._values)
            distances = torch.empty(len(query), k, dtype=torch.float64)
            items, workspace = torch.empty(len(query), k, dtype=torch.int64), _workspace(2, query.shape[1])
            status = _native.module.rank_kept(
                self._fields(),
                _fields(query),
                _fields(gallery),
                METRICS.index(metric),
                self.sign,
                slack,
                k,
                distances.data_ptr(),
                items.data_ptr(),
                workspace.data_ptr(),
                dispatch.DTYPE_CODES[query.dtype],
                torch.get_num_threads(),
            )
            dispatch.check_status(status, "rank_kept", query, gallery)
            return distances, items
        items = self.items.sort(dim=1).values  # [rows, count]
        of_row = torch.arange(len(items), device=items.device).repeat_interleave(items.shape[1])
        pairs = torch.ops.sabmn_ext.pair_distances(query, gallery, of_row, items.flatten(), metric, None)
        distances, order = (self.sign * pairs.view_as(items)).sort(dim=1, stable=True)  # ties: the lower item
        return distances[:, :k].contiguous(), items.gather(1, order)[:, :k].contiguous()

    def _fields(self) -> tuple[int, ...]:
        kept = (self._values, self._items, self._limits, self._filled)
        return *(tensor.data_ptr() for tensor in kept), len(self._values), self._count, self._values.shape[1]

    def _settled(self, kept: Tensor) -> Tensor:
        if bool((self._filled > self._count).any()):
            assert _native.module is not None
            _native.module.settle_smallest(self._fields(), torch.get_num_threads())
        return kept[:, : min(self._count, self._seen)]


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
