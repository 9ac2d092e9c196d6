"""What a forward pass leaves for the backward pass, tensor by tensor, from the shape alone. Imports no torch.

A product ``x W`` needs x again, a nonlinear function its input or its result, a sum nothing. So what autograd keeps can
be read off :mod:`minimoe.layers`, and that is done here: a function a kind of block, a line a tensor, in the letters of
layers/__init__.py (I = H P is Mamba-2's inner width). Sizes are bytes, first of a token, then of all.
"""
from __future__ import annotations

from dataclasses import dataclass, replace

from ..catalog.spec import MLP, Attention, Block, Mamba2, MoE, as_spec
from ..config import HybridConfig
from .parameters import _block as _parameters

LOGITS = 64_000_000  # HybridLM.loss has no more bytes of logits at once


@dataclass(frozen=True)
class Pass:
    """A forward pass: ``batch`` windows of ``length`` tokens; w bytes a number that enters or leaves a product.

    cpu        whether RMSNorm keeps the normalised vector too, as it does where it is no fused kernel
    documents  documents a window that are kept apart; None: windows are read as one text
    drafts     inside the MTP block, whose stream has w bytes a number as well
    """

    config: HybridConfig
    batch: int
    length: int
    w: int
    cpu: bool
    documents: int | None
    drafts: bool = False

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    def norm(self, d: int) -> int:
        """A token's RMSNorm: its input, one over the root mean square, perhaps the normalised vector."""
        return 4 * d + 4 + 4 * d * self.cpu

    def read(self, d: int, products: int = 1) -> int:
        """What products keep of their input: the norm's result, or each of them a copy in bfloat16."""
        return 4 * d if self.w == 4 else 2 * d * (1 if self.drafts else products)


@dataclass(frozen=True)
class Part:
    """A part of the model, whose backward pass is one stretch of time.

    saved    bytes kept for it
    flight   bytes of gradients on the way when they are most: of activations, and of weights passed so far
    weights  numbers that have their gradient when it is over
    copies   bytes of its weights that autocast has cast and holds until the forward pass ends
    waiting  bytes of gradients of tables with two uses that wait, meanwhile, for the second
    trunk    whether it is a block of the trunk, which recompute applies to
    """

    kind: str
    saved: float
    flight: float
    weights: int
    copies: int = 0
    waiting: int = 0
    trunk: bool = False


def parts(how: Pass, mtp: bool) -> list[Part]:
    """The model in the order of its forward pass. A table with two uses counts as weight where it is used last."""
    spec, d, T = as_spec(how.config), how.config.hidden_size, how.tokens
    table = how.config.vocab_size * d
    trunk = [_block(block, how) for block in spec.blocks]
    if not (mtp and spec.mtp):
        return [Part("embedding", 8 * T, 0, table), *trunk, _head(how, "head", d + table)]  # the ids
    # The MTP block reads both tables too, so the gradient that it gives each of them waits for the trunk's.
    embedding, again = 4 * table, how.w * table  # again: the head's, which in bfloat16 is the gradient of a copy
    adding = 2 * 4 * table if how.w == 4 else 2 * table  # the trunk's and the sum, beside the one that waits
    drafts = replace(how, drafts=True)
    join = T * (2 * how.norm(d) + how.w * 2 * d) + 2 * 2 * d * d * (how.w == 2)  # two norms, their results side by side
    head = _head(how, "head", d)
    return [
        Part("embedding", 8 * T, 4 * table, 0, waiting=embedding),
        *(replace(part, waiting=embedding) for part in trunk),
        replace(head, flight=max(head.flight, 4 * d + adding), waiting=embedding + again),
        Part("mtp", join, 0, 2 * d * d + 2 * d + table, waiting=again),
        *(replace(_block(block, drafts), kind="mtp", waiting=again, trunk=False) for block in spec.mtp[0].blocks),
        _head(drafts, "mtp", d + table),
    ]


def _head(how: Pass, kind: str, weights: int) -> Part:
    """Final norm, logits, cross-entropy. Logits beyond 64 MB are made slice by slice, twice, and not kept."""
    d, V, T = how.config.hidden_size, how.config.vocab_size, how.tokens
    saved = T * (how.norm(d) + (0 if how.drafts else 8))  # and the targets
    if T > LOGITS // (4 * V):
        table = 4 * V * d * (weights > d)  # the slices' gradients of the table are added up, here or to one that waits
        flight = max(3 * LOGITS + table, 3 * table)
        return Part(kind, saved + T * d * (how.w if how.drafts else 4), flight, weights)
    saved += T * (how.read(d) + 4 * V)  # and log-probabilities
    copy = 2 * V * d * (how.w == 2 and not how.drafts)
    return Part(kind, saved + copy, 2 * 4 * V * T, weights)


def _block(block: Block, how: Pass) -> Part:
    d = how.config.hidden_size
    by_kind = _parameters(block, d)
    weights = by_kind.total() - (block.experts if isinstance(block, MoE) else 0)  # the router's bias has no gradient
    match block:
        case Attention():
            kind, saved, flight, cast = "attention", *_attention(block, how), by_kind["attention"]
        case Mamba2():
            in_and_out = d * (2 * block.inner_size + block.conv_dim + block.heads)
            kind, saved, flight, cast = "mamba2", *_mamba2(block, how), in_and_out
        case MLP():
            kind, saved, flight, cast = "mlp", *_mlp(block, how), by_kind["mlp"]
        case MoE():
            kind, saved, flight, cast = "moe", *_moe(block, how), by_kind["shared_experts"] + by_kind["latent"]
    copies = 2 * cast * (how.w == 2)
    experts = 2 * by_kind["routed_experts"] * (how.w == 2)  # cast without autocast, which does not hold these
    return Part(kind, saved + copies + experts, flight, weights, copies, trunk=True)


def _attention(block: Attention, how: Pass) -> tuple[float, float]:
    """Bytes saved, and in flight."""
    d, w, heads, keys = how.config.hidden_size, how.w, block.heads * block.head_dim, block.kv_heads * block.head_dim
    token = how.norm(d) + how.read(d, 3) + w * heads  # what the scores make of the values
    if not how.cpu and (how.documents or w == 4):  # see layers.attention.wants_equal_heads
        keys = heads
    token += w * (heads + 2 * keys) + 4 * block.heads  # queries, keys, values; the softmax's denominators
    mask = w * how.batch * how.length**2 if how.documents else 0  # as numbers to add, anew in each layer
    return how.tokens * token + mask, how.tokens * w * 2 * (heads + keys) + 4 * heads * d  # behind: the output's product


def _mlp(block: MLP, how: Pass) -> tuple[float, float]:
    d, hidden = how.config.hidden_size, 2 * how.w * block.width  # relu, and its square
    return how.tokens * (how.norm(d) + how.read(d) + hidden), how.tokens * hidden + 4 * d * block.width


def _moe(block: MoE, how: Pass) -> tuple[float, float]:
    d, w, E, K, F, S = how.config.hidden_size, how.w, block.experts, block.top_k, block.width, block.shared_width
    R, latent = block.latent or d, block.latent is not None
    token = how.norm(d) + how.read(d, 1 + latent)  # for the shared expert, and for the latent
    token += 4 * d * (w == 2)  # for the router, in float32 whatever the products are
    token += 4 * E + 8 * K + (4 * K + 4) * how.config.norm_topk_prob  # scores; which are chosen; those, and their sum
    token += w * R * latent + 2 * w * S  # what the experts add up to; the shared expert's relu and its square
    token += 8 * K  # the choices' order by expert
    rows, row = float(how.tokens * K), 8 + 4  # whose token it is, with what weight
    if how.cpu and w == 2 and rows > E and not (F % 8 or R % 8):  # runs are made longer, to a multiple of 32
        rows, row = rows + 15.5 * E, row + 9  # which row it repeats, if any
    row += w * (2 * R + 2 * F) + 4 * R  # an expert's input, relu, its square, output; that times the weight
    flight = rows * max(2 * w * F, (8 + w) * R) + 4 * (E * F * R + R * d * latent + 2 * d * S)
    return how.tokens * token + rows * row, flight


def _mamba2(block: Mamba2, how: Pass) -> tuple[float, float]:
    d, H, G, N, T = how.config.hidden_size, block.heads, block.groups, block.state_size, how.tokens
    inner, channels, taps = block.inner_size, block.conv_dim, block.conv_kernel
    token = how.norm(d) + how.read(d)
    token += 4 * (inner + channels + H if how.w == 4 else inner)  # the gate; in float32 it keeps its whole product alive
    token += 3 * 4 * channels + 4 * H  # before the convolution, after it, after silu; dt before softplus
    token += 4 * 4 * inner + 4 * G + how.w * inner  # y, silu(gate), their product, that normalised; times the weight
    window = 4 * channels * how.batch * (taps - 1)  # zeros before the first token

    Q = min(how.config.chunk_size, how.length)
    chunks = -(-how.length // Q)
    step = 5 * 4 * H + 4 * inner  # dt, its sum, and what of that is cut and exponentiated; dt x
    step += 2 * 4 * G * N + 4 * G * Q  # Bmat and Cmat by group, their scores
    step += 2 * 4 * H * Q  # the decay inside a chunk, and that times the scores
    step += 2 * 4 * H * N * (chunks > 1)  # Bmat and Cmat with the decay to the chunk's end and from its start
    step += 4 * channels * (how.length % Q > 0)  # x, Bmat and Cmat again, padded to whole chunks
    states = 4 * how.batch * inner * N * (2 * chunks - 1)  # of the chunks' starts, each by itself and side by side
    borders = 0
    if how.documents:
        step += 2 * 4 * H + Q  # which decays and which of a chunk's scores count
        borders = how.batch * (how.documents - 1) * (taps - 1) * (taps + 1) * (4 * channels + 8)  # outputs made anew
    saved = T * token + window + how.batch * chunks * Q * step + states + borders
    return saved, T * 4 * inner * (4 if how.cpu else 2) + 4 * inner * d  # in the gated norm's backward pass
