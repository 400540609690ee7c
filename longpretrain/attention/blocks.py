"""How the portable backend cuts the work: blocks of queries and the keys that each may see.

Heads of one dilation are laid out together as streams, contiguous [S, N, D]. In a stream of
dilation d the tokens r, r+d, r+2d, ... of a residue class are an undilated problem on strided
views; a token's number within its class is called its place. A block of neighbouring queries needs
one slice of places. Only the two corners of its scores lie outside the window, so masks are added
there and nowhere else. Global tokens are hidden in the band and come as a second, gathered set of
keys in the same softmax: each key counts once.

The keys and queries of a block, the slots and the numbers of a head are filled up to whole sixteens
with zeros, hidden by NOTHING where they are keys. Dropout draws sixteen keys at a time, and matrix
products of such shapes do not depend on the number of threads (measured with MKL in float32; those
of odd shapes do, and so do those of float64).

Nothing here copies from the host to the device, so that a call can be captured in a CUDA graph:
numbers reach the device as arguments of kernels (arange, full, masked_fill), never as tensors.

Letters: B batch row, N query, M key, H head, D number of a head, G slot of a global token,
S stream (batch row x head of one dilation), m and n the queries and keys of one block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from longpretrain.attention import philox
from longpretrain.attention.softmax import NOTHING, SIXTEEN, Keys, Source, Work

_ALL = slice(None)


@dataclass(frozen=True)
class Problem:
    """One call of the operator: its numbers, and the masks that all heads share."""

    batch: int
    num_rows: int
    num_keys: int
    one_sided_window: int
    causal: bool
    q_offset: int
    drop_below: int  # round(256 p); 0 means no dropout
    num_slots: int  # without the fill
    seed_B: Tensor | None
    document_BM: Tensor | None
    padding_bias_BM: Tensor | None  # NOTHING at padding
    band_bias_BM: Tensor | None  # NOTHING at padding and at global tokens
    slot_key_BG: Tensor | None  # the slot's key position; 0 for an unused slot
    slot_bias_BG: Tensor | None  # NOTHING at slots that are unused or name padding
    slot_row_BG: Tensor | None  # the slot's row; num_rows, a spare row, when it has none here

    @property
    def kept_scale(self) -> float:
        return 256 / (256 - self.drop_below)


class Limits(NamedTuple):
    """How much is worked on at once."""

    queries: int  # of a block
    scores: int  # of all streams together
    counters: int  # of Philox


# Measured: few queries leave little outside the window, 2 MB of scores stay in a CPU's cache, and
# so many counters pay for Philox's hundred small steps. A GPU wants more at once.
CPU_LIMITS = Limits(queries=64, scores=1 << 19, counters=1 << 16)
GPU_LIMITS = Limits(queries=256, scores=1 << 25, counters=1 << 23)


class _Part(NamedTuple):
    """Streams that are worked on together: whole batch rows, or heads of a single one."""

    streams: slice
    rows: slice
    heads: slice

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.heads.stop - self.heads.start

    @property
    def num_streams(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class _Block:
    """Neighbouring queries of one residue class and the slice of keys their windows cover."""

    dilation: int
    residue: int
    first_query: int  # this and the next four count places
    num_queries: int
    first_key: int
    num_keys: int  # with the fill
    num_real_keys: int
    num_missing_keys: int  # of the fill: those that the stream has no row for
    left: int  # reach
    right: int

    def positions(self, first: int, count: int) -> slice:
        start = self.residue + first * self.dilation
        return slice(start, start + (count - 1) * self.dilation + 1, self.dilation)

    @property
    def queries(self) -> slice:
        return self.positions(self.first_query, self.num_queries)

    @property
    def keys(self) -> slice:
        """Ends where tokens end: ``num_missing_keys`` short for streams, and masks, which have no
        fill, give ``num_real_keys`` columns.
        """
        return self.positions(self.first_key, self.num_keys)

    def corner_biases(self, like: Tensor) -> list[tuple[slice, Tensor]]:
        """NOTHING for the keys of the slice that lie outside a query's window."""
        biases = []
        # Query t, counted from 0, reaches the columns from lowest + t to highest + t.
        lowest = self.first_query - self.left - self.first_key
        after_highest = self.first_query + self.right - self.first_key + 1
        left_width = min(self.num_keys, lowest + self.num_queries - 1)
        if left_width > 0:
            corner = like.new_full((self.num_queries, left_width), NOTHING).tril_(lowest - 1)
            biases.append((slice(0, left_width), corner))
        if after_highest < self.num_keys:
            shape = (self.num_queries, self.num_keys - after_highest)
            biases.append((slice(after_highest, None), like.new_full(shape, NOTHING).triu_()))
        if self.num_real_keys < self.num_keys:
            biases.append((slice(self.num_real_keys, None), like.new_full((), NOTHING)))
        return biases


@dataclass
class HeadGroup:
    """The heads of one dilation: cuts their streams into blocks and finds the keys of each."""

    problem: Problem
    dilation: int
    heads: list[int]
    device: torch.device
    _corners: dict[tuple[int, ...], list[tuple[slice, Tensor]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # In turn, so that heads are picked by slices: a list as an index is copied to the device.
        self.runs = _runs(self.heads)
        self.head_H = torch.cat([torch.arange(*run, device=self.device) for run in self.runs])
        # The tokens of a stream of keys.
        self.num_filled = _round_up(self.problem.num_keys, SIXTEEN)
        self.limits = CPU_LIMITS if self.device.type == "cpu" else GPU_LIMITS

    def slices(self) -> Iterator[tuple[slice, slice]]:
        """The stretches of heads: where they lie in the group, and where among all heads."""
        first = 0
        for start, stop in self.runs:
            yield slice(first, first + stop - start), slice(start, stop)
            first += stop - start

    def local_work(self, band: Source, slots: Source | None) -> Iterator[Work]:
        """The local queries, block by block in an order that never changes."""
        problem, d, step = self.problem, self.dilation, self.limits.queries
        num_slots = 0 if slots is None else slots.k_SMD.shape[1]
        for residue in range(min(d, problem.num_keys)):
            first_row = (residue - problem.q_offset) % d
            first_place = (problem.q_offset + first_row) // d
            num_queries = _ceil_div(problem.num_rows - first_row, d)
            blocks = [
                self._block(residue, first_place + start, min(step, num_queries - start))
                for start in range(0, num_queries, step)
            ]
            if not blocks:
                continue
            widest = max(block.num_keys for block in blocks)
            for part in self._parts(step * (widest + num_slots)):
                for block, band_bytes, slot_bytes in self._with_bytes(blocks, widest, part):
                    sets = [self._band_keys(block, band, part, band_bytes)]
                    if slots is not None:
                        sets.append(self._slot_keys(block, slots, part, slot_bytes))
                    of_queries, offset = block.queries, problem.q_offset
                    rows = slice(of_queries.start - offset, of_queries.stop - offset, d)
                    yield Work((part.streams, rows), part.shape, sets)

    def global_work(self, every_key: Source) -> Iterator[Work]:
        """The global queries, each attending to all keys; their rows are slots."""
        problem = self.problem
        assert problem.slot_key_BG is not None
        num_slots = problem.slot_key_BG.shape[1]
        step = max(SIXTEEN, self.limits.scores // self.num_filled // SIXTEEN * SIXTEEN)
        for start in range(0, num_slots, step):
            slots = slice(start, min(start + step, num_slots))
            for part in self._parts((slots.stop - start) * self.num_filled):
                keys = self._all_keys(slots, every_key, part)
                yield Work((part.streams, slots), part.shape, [keys])

    def _block(self, residue: int, first_query: int, num_queries: int) -> _Block:
        left = self.problem.one_sided_window
        right = 0 if self.problem.causal else left
        num_places = _ceil_div(self.problem.num_keys - residue, self.dilation)
        first_key = max(0, first_query - left) // SIXTEEN * SIXTEEN
        last_key = min(num_places, first_query + num_queries + right)
        num_keys = _round_up(last_key - first_key, SIXTEEN)
        num_rows = _ceil_div(self.num_filled - residue, self.dilation) - first_key
        return _Block(
            self.dilation,
            residue,
            first_query,
            num_queries,
            first_key,
            num_keys,
            min(num_keys, num_places - first_key),
            max(0, num_keys - num_rows),
            left,
            right,
        )

    def _parts(self, scores_per_stream: int) -> Iterator[_Part]:
        batch, num_heads = self.problem.batch, len(self.heads)
        fit = max(1, self.limits.scores // scores_per_stream)
        if fit >= num_heads:
            for first in range(0, batch, fit // num_heads):
                last = min(first + fit // num_heads, batch)
                streams = slice(first * num_heads, last * num_heads)
                yield _Part(streams, slice(first, last), slice(0, num_heads))
            return
        for row in range(batch):
            for first in range(0, num_heads, fit):
                last = min(first + fit, num_heads)
                streams = slice(row * num_heads + first, row * num_heads + last)
                yield _Part(streams, slice(row, row + 1), slice(first, last))

    def _with_bytes(
        self, blocks: list[_Block], widest: int, part: _Part
    ) -> Iterator[tuple[_Block, Tensor | None, Tensor | None]]:
        """Each block with the bytes of dropout for its band and its slots.

        Several blocks draw together, because a step of Philox on few counters is all overhead.
        """
        if not self.problem.drop_below:
            yield from ((block, None, None) for block in blocks)
            return
        sixteens, num_slots = widest // SIXTEEN, self.problem.num_slots
        num_queries = max(block.num_queries for block in blocks)
        per_block = part.num_streams * num_queries * (sixteens + num_slots)
        together = max(1, self.limits.counters // per_block)
        step, left = self.limits.queries, self.problem.one_sided_window
        for start in range(0, len(blocks), together):
            run = blocks[start : start + together]
            # From one block to the next, places move on by ``step``.
            offset_k1 = torch.arange(0, len(run) * step, step, device=self.device)[:, None]
            place_km = offset_k1 + (run[0].first_query + self._range(num_queries))
            query_km = place_km * self.dilation + run[0].residue
            first_k1 = (offset_k1 + (run[0].first_query - left)).clamp_(min=0) // SIXTEEN
            band_BHkmn = philox.dropout_bytes(
                *self._names(part),
                query_km[:, :, None],
                self._number(run[0].residue),
                (first_k1 + self._range(sixteens))[:, None],
            )
            slot_BHkmG = self._slot_bytes(query_km, part)
            for i, block in enumerate(run):
                queries, columns = slice(0, block.num_queries), slice(0, block.num_keys)
                slot_BHmG = None if slot_BHkmG is None else slot_BHkmG[:, :, i, queries]
                yield block, band_BHkmn[:, :, i, queries, columns], slot_BHmG

    def _names(self, part: _Part) -> tuple[Tensor, Tensor]:
        """What Philox calls the streams: seeds [B, 1, 1, 1, 1] and heads [H, 1, 1, 1]."""
        assert self.problem.seed_B is not None
        seed_B1111 = self.problem.seed_B[part.rows, None, None, None, None]
        return seed_B1111, self.head_H[part.heads, None, None, None]

    def _slot_bytes(self, query_km: Tensor, part: _Part) -> Tensor | None:
        """Bytes of dropout of global keys, some slots at a time: each takes a Philox of its own."""
        if self.problem.slot_key_BG is None:
            return None
        num_slots = self.problem.num_slots
        key_BG = self.problem.slot_key_BG[part.rows, :num_slots]
        at_once = max(1, self.limits.counters // (part.num_streams * query_km.numel()))
        bytes_BHkmG = [
            philox.dropout_byte(
                *self._names(part),
                query_km[:, :, None],
                some_BG[:, None, None, None],
                dilation=self._number(self.dilation),
            ).to(torch.uint8)
            for some_BG in torch.split(key_BG, at_once, dim=1)
        ]
        return pad(torch.cat(bytes_BHkmG, dim=-1), (0, -num_slots % SIXTEEN))

    def _row_bytes(self, query_BG: Tensor, part: _Part) -> Tensor:
        """Bytes of dropout of the rows of global queries, some rows at a time."""
        d, num_filled = self.dilation, self.num_filled
        num_places = _ceil_div(num_filled, d)
        sixteens = _ceil_div(num_places, SIXTEEN)
        seed_B1111, head_H111 = self._names(part)
        at_once = max(1, self.limits.counters // (part.num_streams * d * sixteens))
        rows = []
        for some_BG in torch.split(query_BG, at_once, dim=1):
            byte_BHGdn = philox.dropout_bytes(
                seed_B1111,
                head_H111 + philox.GLOBAL_ROW,
                some_BG[:, None, :, None, None],
                self._range(d)[:, None],
                self._range(sixteens),
            )
            # A key's position is place * dilation + residue.
            byte_BHGnd = byte_BHGdn.transpose(-1, -2)[..., :num_places, :]
            rows.append(byte_BHGnd.flatten(-2)[..., :num_filled])
        return torch.cat(rows, dim=2)

    def _band_keys(
        self, block: _Block, band: Source, part: _Part, byte_BHmn: Tensor | None
    ) -> Keys:
        """The keys of the windows, without global tokens."""
        problem = self.problem
        columns = slice(0, block.num_real_keys)
        outline = (
            block.num_queries,
            block.num_keys,
            block.num_real_keys,
            block.first_query - block.first_key,
        )
        if outline not in self._corners:
            self._corners[outline] = block.corner_biases(band.k_SMD)
        biases = [*self._corners[outline]]
        if problem.band_bias_BM is not None:
            biases.append((columns, problem.band_bias_BM[part.rows, None, None, block.keys]))
        if problem.document_BM is not None:
            document_BM = problem.document_BM[part.rows]
            hidden = _elsewhere(document_BM[:, block.queries], document_BM[:, block.keys])
            biases.append((columns, _bias(hidden, band)))
        return Keys(
            band,
            (part.streams, block.keys),
            biases,
            byte_BHmn,
            problem.drop_below,
            num_missing=block.num_missing_keys,
        )

    def _slot_keys(
        self, block: _Block, slots: Source, part: _Part, byte_BHmG: Tensor | None
    ) -> Keys:
        """The global keys."""
        problem = self.problem
        assert problem.slot_key_BG is not None and problem.slot_bias_BG is not None
        key_BG = problem.slot_key_BG[part.rows]
        biases = [(_ALL, problem.slot_bias_BG[part.rows, None, None])]
        if problem.causal:
            queries = block.queries
            query_m = torch.arange(queries.start, queries.stop, queries.step, device=self.device)
            biases.append((_ALL, _bias(key_BG[:, None] > query_m[:, None], slots)))
        if problem.document_BM is not None:
            document_BM = problem.document_BM[part.rows]
            hidden = _elsewhere(document_BM[:, block.queries], document_BM.gather(1, key_BG))
            biases.append((_ALL, _bias(hidden, slots)))
        return Keys(slots, (part.streams, _ALL), biases, byte_BHmG, problem.drop_below)

    def _all_keys(self, slots: slice, every_key: Source, part: _Part) -> Keys:
        """What global queries attend to."""
        problem = self.problem
        assert problem.slot_key_BG is not None
        query_BG = problem.slot_key_BG[part.rows, slots]
        columns, fill = slice(0, problem.num_keys), slice(problem.num_keys, None)
        biases = [(fill, every_key.k_SMD.new_full((), NOTHING))]
        if problem.padding_bias_BM is not None:
            biases.append((columns, problem.padding_bias_BM[part.rows, None, None]))
        if problem.causal:
            later = self._range(problem.num_keys) > query_BG[:, :, None]
            biases.append((columns, _bias(later, every_key)))
        if problem.document_BM is not None:
            document_BM = problem.document_BM[part.rows]
            hidden = _elsewhere(document_BM.gather(1, query_BG), document_BM)
            biases.append((columns, _bias(hidden, every_key)))
        byte_BHGM = None
        if problem.drop_below:
            num_drawn = min(slots.stop, problem.num_slots) - slots.start
            byte_BHGM = self._row_bytes(query_BG[:, :num_drawn], part)
            byte_BHGM = pad(byte_BHGM, (0, 0, 0, query_BG.shape[1] - num_drawn))
        return Keys(every_key, (part.streams, _ALL), biases, byte_BHGM, problem.drop_below)

    def _range(self, count: int) -> Tensor:
        return torch.arange(count, device=self.device)

    def _number(self, number: int) -> Tensor:
        return torch.full((), number, device=self.device)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Rising numbers as stretches without a gap: first, and one past the last."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs


def _round_up(a: int, multiple: int) -> int:
    return _ceil_div(a, multiple) * multiple


def _bias(hidden_Bmn: Tensor, source: Source) -> Tensor:
    """NOTHING where hidden, else 0, for all heads: [B, 1, m, n]."""
    bias_Bmn = source.k_SMD.new_zeros(hidden_Bmn.shape)
    return bias_Bmn.masked_fill_(hidden_Bmn, NOTHING)[:, None]


def _elsewhere(query_Bm: Tensor, key_Bn: Tensor) -> Tensor:
    """Where the query's document is not the key's."""
    return query_Bm[:, :, None] != key_Bn[:, None]
