"""What a sequence leaves behind: keys and values, convolution windows, state-space states.

A state is immutable in meaning: a call returns a new one and an older one stays valid, so going back is free.
Bytes are shared: keys and values live in an append-only buffer with a length, and an older state is the same
buffer read up to a shorter length. Only a write from an older state copies.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """Which tokens of a call are real, and which of them belong together. One per call, shared by all layers.

    past_B        tokens that each row had seen before this call
    lengths_B     real tokens of each row in this call; the rest of the row is padding
    padded        whether some row is shorter than the call
    valid_BL      True at real tokens (None if all are)
    run_BL        packed documents: 0 continues the document of the state, 1, 2, ... are new ones (None: no packing)
    first_key_BL  position of the first key that each query may see (None: the first of all)
    """

    past: tuple[int, ...]
    lengths: tuple[int, ...]
    padded: bool = False
    valid_BL: Tensor | None = None
    run_BL: Tensor | None = None
    first_key_BL: Tensor | None = None

    @staticmethod
    def whole(batch: int, length: int, past: int = 0) -> "Span":
        """Every token of every row is real and belongs to one document."""
        return Span((past,) * batch, (length,) * batch)

    @cached_property
    def total(self) -> tuple[int, ...]:
        """Tokens that each row has seen after this call."""
        return tuple(p + n for p, n in zip(self.past, self.lengths))

    @cached_property
    def longest(self) -> int:
        """Tokens that the row with most of them had seen before this call."""
        return max(self.past)

    @cached_property
    def level(self) -> bool:
        """Whether all rows had seen equally many."""
        return self.past.count(self.past[0]) == len(self.past)

    @cached_property
    def _made(self) -> dict[str, Tensor]:
        return {}

    def shared(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """What follows from this Span and the call's shape, such as a mask: the first layer to ask makes it."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]


class _Buffer:
    """Room for keys and values [B, H, capacity, P] and how far each row of it has been written."""

    def __init__(self, k: Tensor, v: Tensor, written: tuple[int, ...]) -> None:
        self.k, self.v, self.written = k, v, written

    @property
    def capacity(self) -> int:
        return self.k.shape[2]


@dataclass(frozen=True)
class KVState:
    """Keys and values of one attention layer: a buffer and the length of each row that this state may see."""

    buffer: _Buffer = field(repr=False)
    lengths: tuple[int, ...]

    @property
    def k(self) -> Tensor:
        """Keys [B, H, longest row, P]; rows shorter than the longest end in values that mean nothing."""
        return self.buffer.k[:, :, : max(self.lengths)]

    @property
    def v(self) -> Tensor:
        """Values, laid out as the keys."""
        return self.buffer.v[:, :, : max(self.lengths)]

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values that count: 2 * H * P * bytes * tokens, summed over rows."""
        per_token = self.buffer.k[0, :, 0].numel() * self.buffer.k.element_size()
        return 2 * per_token * sum(self.lengths)

    def map(self, change: Callable[[Tensor], Tensor], rows: Sequence[int] | None = None) -> "KVState":
        """A state with a buffer of its own, holding ``change`` of the keys and of the values."""
        lengths = self.lengths if rows is None else tuple(self.lengths[r] for r in rows)
        return KVState(_Buffer(change(self.k), change(self.v), lengths), lengths)


def append_kv(state: KVState | None, k_BHLP: Tensor, v_BHLP: Tensor, span: Span) -> KVState:
    """Write the call's keys and values behind those of ``state``.

    In place if ``state`` is the newest of its buffer, the buffer has room and gradients are switched off; else into
    a larger copy. Amortised cost of the first: a constant number of bytes per token.
    """
    graph = torch.is_grad_enabled()
    if state is None:
        return KVState(_Buffer(k_BHLP, v_BHLP, () if graph else span.lengths), span.lengths)
    buffer, L = state.buffer, k_BHLP.shape[2]
    needed = span.longest + L
    foreign = buffer.k.is_inference() != torch.is_inference_mode_enabled()
    if graph or foreign or buffer.written != state.lengths or buffer.capacity < needed:
        # Autograd remembers what it read, so a graph's buffer has no room to spare: nobody writes into it.
        room = needed if graph else needed + max(64, needed // 4)
        buffer = _Buffer(_grown(state.k, room), _grown(state.v, room), state.lengths)
    if span.level:
        buffer.k.narrow(2, span.longest, L).copy_(k_BHLP)
        buffer.v.narrow(2, span.longest, L).copy_(v_BHLP)
    else:
        past_B = torch.tensor(span.past, device=k_BHLP.device)
        at_BL = past_B[:, None] + torch.arange(L, device=k_BHLP.device)
        index = at_BL[:, None, :, None].expand_as(k_BHLP)
        buffer.k.scatter_(2, index, k_BHLP.to(buffer.k.dtype))
        buffer.v.scatter_(2, index, v_BHLP.to(buffer.v.dtype))
    buffer.written = () if graph else span.total  # what a graph may have read is never written again
    return KVState(buffer, span.total)


def _grown(x_BHSP: Tensor, capacity: int) -> Tensor:
    return torch.cat([x_BHSP, x_BHSP.new_zeros(*x_BHSP.shape[:2], capacity - x_BHSP.shape[2], x_BHSP.shape[3])], 2)


@dataclass(frozen=True)
class MambaState:
    """What one Mamba-2 layer keeps: the last inputs of the convolution and the state of the recurrence.

    conv_BKC   [B, conv_kernel - 1, C], the model's dtype
    ssm_BHPN   [B, H, P, N], at least float32
    """

    conv_BKC: Tensor
    ssm_BHPN: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of both; the same after any number of tokens."""
        return self.conv_BKC.nbytes + self.ssm_BHPN.nbytes

    def map(self, change: Callable[[Tensor], Tensor], rows: Sequence[int] | None = None) -> "MambaState":
        return MambaState(change(self.conv_BKC), change(self.ssm_BHPN))


LayerState = KVState | MambaState | None


@dataclass(frozen=True)
class HybridState:
    """The state of a whole model after some tokens: one entry a layer, None for layers that remember nothing.

    lengths        tokens seen, a row each
    document_B     id of the document that each row is in (packed input only)
    started_B      position at which that document began
    """

    layers: tuple[LayerState, ...]
    lengths: tuple[int, ...]
    document_B: Tensor | None = None
    started_B: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that this state stands for; spare room in the buffers is not counted."""
        return sum(layer.nbytes for layer in self.layers if layer is not None)

    @property
    def kv_nbytes(self) -> int:
        """The part that grows with every token."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, KVState))

    def _map(self, change: Callable[[Tensor], Tensor], rows: Sequence[int] | None = None) -> "HybridState":
        return replace(
            self,
            layers=tuple(None if layer is None else layer.map(change, rows) for layer in self.layers),
            lengths=self.lengths if rows is None else tuple(self.lengths[r] for r in rows),
            document_B=None if self.document_B is None else change(self.document_B),
            started_B=None if self.started_B is None else change(self.started_B),
        )

    def to(self, device: torch.device | str) -> "HybridState":
        """The same state on another device."""
        return self._map(lambda x: x.to(device))

    def detach(self) -> "HybridState":
        """The same values without their graph (truncated back-propagation through time)."""
        return self._map(lambda x: x.detach().clone())

    def select(self, rows: Sequence[int]) -> "HybridState":
        """The given rows, in the given order; a row may be repeated."""
        rows = [int(r) for r in rows]
        if not rows:
            raise IndexError("select needs at least one row")
        wrong = [r for r in rows if not 0 <= r < len(self.lengths)]
        if wrong:
            raise IndexError(f"row {wrong[0]} is not in a state of {len(self.lengths)} rows")
        return self._map(lambda x: x.index_select(0, torch.tensor(rows, device=x.device)), rows)
