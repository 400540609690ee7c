"""How the portable backend cuts the work: blocks of queries and the keys that each may see.

Heads of one dilation are laid out together as streams, contiguous [S, N, D]. In a stream of
dilation d the tokens r, r+d, r+2d, ... of a residue class are an undilated problem on strided
views; a token's number within its class is called its place. A block of neighbouring queries needs
one slice of places. Only the two corners of its scores lie outside the window, so masks are added
there and nowhere else. Global tokens are hidden in the band and come as a second, gathered set of
keys in the same softmax: each key counts once.

Keys and slots are filled up to whole sixteens with zeros that NOTHING hides. Dropout draws sixteen
keys at a time, and matrix products of such shapes do not depend on the number of threads (measured
with MKL in float32; those of odd shapes do).

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
from longpretrain.attention.softmax import NOTHING, Keys, Source, Work

_ALL = slice(None)
SIXTEEN = philox.KEYS_PER_CALL


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
        """Masks, which have no fill, give ``num_real_keys`` columns for it."""
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
        self.head_H = torch.tensor(self.heads, device=self.device)
        # The tokens of a stream of keys, so that each class has a whole number of sixteens.
        self.num_filled = _round_up(self.problem.num_keys, SIXTEEN * self.dilation)
        self.limits = CPU_LIMITS if self.device.type == "cpu" else GPU_LIMITS

    def local_work(self, band: Source, slots: Source | None) -> Iterator[Work]:
        """The local queries, block by block in an order that never changes."""
        problem, d, step = self.problem, self.dilation, self.limits.queries
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
            for part in self._parts(step * widest):
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
        return _Block(
            self.dilation,
            residue,
            first_query,
            num_queries,
            first_key,
            num_keys,
            min(num_keys, num_places - first_key),
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
        seed_B = self.problem.seed_B
        assert seed_B is not None
        seed_B1111 = seed_B[part.rows, None, None, None, None]
        head_H111 = self.head_H[part.heads, None, None, None]
        sixteens = widest // SIXTEEN
        per_block = part.shape[0] * part.shape[1] * self.limits.queries * sixteens
        together = max(1, self.limits.counters // per_block)
        for start in range(0, len(blocks), together):
            run = blocks[start : start + together]
            first_query_k1 = self._column([block.queries.start for block in run])
            query_km = first_query_k1 + self.dilation * self._range(self.limits.queries)
            first_k1 = self._column([block.first_key // SIXTEEN for block in run])
            sixteen_kn = first_k1 + self._range(sixteens)
            band_BHkmn = philox.dropout_bytes(
                seed_B1111,
                head_H111,
                query_km[:, :, None],
                self.head_H.new_tensor(run[0].residue),
                sixteen_kn[:, None],
            )
            slot_BHkmG, num_slots = None, self.problem.num_slots
            if self.problem.slot_key_BG is not None:
                slot_BHkmG = philox.dropout_byte(
                    seed_B1111,
                    head_H111,
                    query_km[:, :, None],
                    self.problem.slot_key_BG[part.rows, None, None, None, :num_slots],
                    dilation=self.head_H.new_tensor(self.dilation),
                )
                slot_BHkmG = pad(slot_BHkmG, (0, -num_slots % SIXTEEN))
            for i, block in enumerate(run):
                queries, columns = slice(0, block.num_queries), slice(0, block.num_keys)
                slot_BHmG = None if slot_BHkmG is None else slot_BHkmG[:, :, i, queries]
                yield block, band_BHkmn[:, :, i, queries, columns], slot_BHmG

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
        return Keys(band, (part.streams, block.keys), biases, byte_BHmn, problem.drop_below)

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
            assert problem.seed_B is not None
            num_drawn = max(0, problem.num_slots - slots.start)
            byte_BHGdn = philox.dropout_bytes(
                problem.seed_B[part.rows, None, None, None, None],
                self.head_H[part.heads, None, None, None] + philox.GLOBAL_ROW,
                query_BG[:, None, :num_drawn, None, None],
                self._range(self.dilation)[:, None],
                self._range(self.num_filled // (SIXTEEN * self.dilation)),
            )
            # A key's position is place * dilation + residue.
            byte_BHGM = byte_BHGdn.transpose(-1, -2).flatten(-2)
            byte_BHGM = pad(byte_BHGM, (0, 0, 0, query_BG.shape[1] - byte_BHGM.shape[2]))
        return Keys(every_key, (part.streams, _ALL), biases, byte_BHGM, problem.drop_below)

    def _range(self, count: int) -> Tensor:
        return torch.arange(count, device=self.device)

    def _column(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, device=self.device)[:, None]


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _round_up(a: int, multiple: int) -> int:
    return _ceil_div(a, multiple) * multiple


def _bias(hidden_Bmn: Tensor, source: Source) -> Tensor:
    """NOTHING where hidden, else 0, for all heads: [B, 1, m, n]."""
    return torch.where(hidden_Bmn, NOTHING, source.k_SMD.new_zeros(()))[:, None]


def _elsewhere(query_Bm: Tensor, key_Bn: Tensor) -> Tensor:
    """Where the query's document is not the key's."""
    return query_Bm[:, :, None] != key_Bn[:, None]
