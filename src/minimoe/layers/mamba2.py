"""Mamba-2: a recurrence that can be read as attention with decay (Dao & Gu 2024, arXiv 2405.21060).

The letters of the paper, and ours: A -> A_H (one negative number a head), B -> Bmat, C -> Cmat, D -> skip_H,
the step size Delta -> dt. Two forms of one function:

    ssd_recurrent   the definition: one token after another, a state of P x N numbers a head
    ssd_chunked     the same numbers from matrix products: attention inside chunks, the recurrence between them

Legend: layers/__init__.py; J = H / G heads share one group's Bmat and Cmat, c counts chunks.
Matches transformers ``NemotronHMamba2Mixer`` with ``time_step_limit = (0, inf)``, and Megatron-LM's MambaMixer.
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import HybridConfig
from ..state import MambaState, Span
from .norm import GatedRMSNorm, at_least_float32, without_autocast


def ssd_step(
    x_B1HP: Tensor, dt_B1H: Tensor, A_H: Tensor, Bmat_B1GN: Tensor, Cmat_B1GN: Tensor,
    state_BHPN: Tensor, clear_B1: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of :func:`ssd_recurrent`; rows where ``clear_B1`` is True forget their state first."""
    B, _, H, P = x_B1HP.shape
    G, N = Bmat_B1GN.shape[2:]
    decay_B1H = torch.exp(dt_B1H * A_H)
    if clear_B1 is not None:
        decay_B1H = decay_B1H * ~clear_B1[..., None]
    write_BGJP1 = (dt_B1H[..., None] * x_B1HP).view(B, G, H // G, P, 1)
    state_BHPN = decay_B1H.view(B, H, 1, 1) * state_BHPN
    state_BHPN.view(B, G, H // G, P, N).addcmul_(write_BGJP1, Bmat_B1GN.view(B, G, 1, 1, N))
    y = torch.bmm(state_BHPN.view(B * G, -1, N), Cmat_B1GN.reshape(B * G, N, 1))  # one product for the heads of a group
    return y.view(B, 1, H, P), state_BHPN


def ssd_recurrent(
    x_BLHP: Tensor, dt_BLH: Tensor, A_H: Tensor, Bmat_BLGN: Tensor, Cmat_BLGN: Tensor,
    state_BHPN: Tensor, run_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, token by token, in the dtype of its inputs (at least float32 in a model):

        S_t = exp(dt_t A) S_{t-1} + dt_t x_t Bmat_t^T        y_t = S_t Cmat_t

    dt = 0 leaves the state as it is. Where ``run_BL`` grows, a new document begins and S is cleared first
    (run 0 continues ``state_BHPN``). Returns y_BLHP and the last state.
    """
    clear_BL = None if run_BL is None else run_BL != F.pad(run_BL[:, :-1], (1, 0))
    if x_BLHP.shape[1] == 1:
        return ssd_step(x_BLHP, dt_BLH, A_H, Bmat_BLGN, Cmat_BLGN, state_BHPN, clear_BL)
    ys = []
    for t in range(x_BLHP.shape[1]):
        x, dt, Bmat, Cmat = (m[:, t : t + 1] for m in (x_BLHP, dt_BLH, Bmat_BLGN, Cmat_BLGN))
        clear = None if clear_BL is None else clear_BL[:, t : t + 1]
        y_B1HP, state_BHPN = ssd_step(x, dt, A_H, Bmat, Cmat, state_BHPN, clear)
        ys.append(y_B1HP)
    return torch.cat(ys, 1), state_BHPN


def ssd_chunked(
    x_BLHP: Tensor, dt_BLH: Tensor, A_H: Tensor, Bmat_BLGN: Tensor, Cmat_BLGN: Tensor,
    state_BHPN: Tensor, chunk_size: int, run_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`ssd_recurrent` by matrix products, in chunks of Q tokens (the paper's section 6; any L, any Q).

    Unrolled, y_i = sum_{j<=i} exp(sum of dt A from j+1 to i) (Cmat_i . Bmat_j) dt_j x_j: attention whose softmax
    is replaced by a decay. Inside a chunk that is computed as written, Q^2 scores a group; everything before the
    chunk is summed up in one state, passed on by the recurrence once a chunk instead of once a token.
    """
    B, L, H, P = x_BLHP.shape
    G, N = Bmat_BLGN.shape[2:]
    J, Q = H // G, min(chunk_size, L)
    pad = -L % Q
    if pad:  # dt = 0 neither decays nor writes
        x_BLHP, Bmat_BLGN, Cmat_BLGN = (F.pad(m, (0, 0, 0, 0, 0, pad)) for m in (x_BLHP, Bmat_BLGN, Cmat_BLGN))
        dt_BLH = F.pad(dt_BLH, (0, 0, 0, pad))
        run_BL = None if run_BL is None else torch.cat([run_BL, run_BL[:, -1:].expand(B, pad)], 1)
    c = (L + pad) // Q

    # Every product below has one matrix a head, so heads go before time once, in the passes that multiply by dt.
    dt = dt_BLH.view(B, c, Q, G, J).permute(0, 1, 3, 4, 2).contiguous()  # B c G J Q
    log_decay = (dt * A_H.view(G, J, 1)).cumsum(-1)  # B c G J Q, falling
    write = dt[..., None] * x_BLHP.view(B, c, Q, G, J, P).permute(0, 1, 3, 4, 2, 5)  # B c G J Q P
    Bmat, Cmat = (m.view(B, c, Q, G, 1, N).permute(0, 1, 3, 4, 2, 5) for m in (Bmat_BLGN, Cmat_BLGN))  # B c G 1 Q N

    # A decay of 1e-25 adds nothing, but its product with another such would be denormal, and those are slow.
    smallest = math.log(torch.finfo(log_decay.dtype).tiny) / 1.5
    gap = log_decay[..., :, None] - log_decay[..., None, :]  # B c G J Q Q
    with torch.no_grad():  # the scores below are zero above the diagonal, so no gradient comes back to what is cut
        gap.clamp_(smallest, 0)
    # The causal mask goes on the scores of the group, of which there are J times fewer.
    scores = (Cmat @ Bmat.transpose(-1, -2)).tril()  # B c G 1 Q Q
    from_start = torch.exp(log_decay.clamp_min(smallest))  # B c G J Q
    to_end = torch.exp((log_decay[..., -1:] - log_decay).clamp_min(smallest))
    chunk_decay = from_start[..., -1]  # B c G J
    if run_BL is not None:  # a score, a read or a write across the border of two documents counts nothing
        run = run_BL.view(B, c, 1, 1, Q)
        before = F.pad(run[:, :-1, ..., -1], (0, 0, 0, 0, 1, 0))  # B c 1 1: the run that the chunk's start state is of
        scores = scores * (run[..., :, None] == run[..., None, :])
        from_start = from_start * (run == before[..., None])
        to_end = to_end * (run == run[..., -1:])
        chunk_decay = chunk_decay * (run[..., -1] == before)

    # Between the chunks: what each adds to the state, and the state that each begins with.
    added = (write.transpose(-1, -2) @ (to_end[..., None] * Bmat)).view(B, c, H, P, N)
    starts = []
    # unbind, because the backward of added[:, k] would fill a whole gradient with zeros once a chunk
    for added_BHPN, decay_BH11 in zip(added.unbind(1), chunk_decay.view(B, c, H, 1, 1).unbind(1)):
        starts.append(state_BHPN)
        state_BHPN = torch.addcmul(added_BHPN, state_BHPN, decay_BH11)
    start = torch.stack(starts, 1).view(B, c, G, J, P, N)

    # A token's output: what it reads from that state, and the attention inside its chunk.
    y = (from_start[..., None] * Cmat) @ start.transpose(-1, -2)
    y = torch.baddbmm(y.view(-1, Q, P), (gap.exp() * scores).view(-1, Q, Q), write.reshape(-1, Q, P))
    return y.view(B, c, H, Q, P).transpose(2, 3).reshape(B, L + pad, H, P)[:, :L], state_BHPN


def causal_conv(x_BMC: Tensor, weight_C1K: Tensor, bias_C: Tensor, run_BM: Tensor | None = None) -> Tensor:
    """Depthwise causal convolution: ``y_t = bias + sum_k weight_k x_{t+k}`` over M = L + K - 1 inputs -> [B, L, C].

    ``run_BM`` stops it at the borders of documents.
    """
    K = weight_C1K.shape[-1]
    L = x_BMC.shape[1] - K + 1
    if run_BM is not None and (L == 1 or torch.compiler.is_compiling()):  # which joins these passes into one
        taps = (
            x_BMC[:, k : k + L] * weight_C1K[:, 0, k] * (run_BM[:, k : k + L] == run_BM[:, K - 1 :])[..., None]
            for k in range(K)
        )
        return sum(taps, bias_C)
    if L == 1:  # one output is a weighted sum; starting a convolution costs more than that
        return (x_BMC * weight_C1K.squeeze(1).t()).sum(1, keepdim=True) + bias_C
    with without_autocast(x_BMC):  # bfloat16 saves nothing where each weight meets one channel
        x_BMC = x_BMC.to(weight_C1K.dtype)
        y_BLC = _Convolution.apply(x_BMC, weight_C1K, bias_C)
        return y_BLC if run_BM is None else _redo_after_borders(y_BLC, x_BMC, weight_C1K, bias_C, run_BM)


def _redo_after_borders(
    y_BLC: Tensor, x_BMC: Tensor, weight_C1K: Tensor, bias_C: Tensor, run_BM: Tensor
) -> Tensor:
    """``y`` with the K - 1 outputs after each border, whose taps reach across it, computed again from one side only."""
    (L, C), (M, K) = y_BLC.shape[1:], (run_BM.shape[1], weight_C1K.shape[-1])
    row_I, time_I = (run_BM[:, :L] != run_BM[:, K - 1 :]).nonzero(as_tuple=True)
    at_IK = (row_I * M + time_I)[:, None] + torch.arange(K, device=run_BM.device)
    run_IK = run_BM.flatten()[at_IK]
    x_IKC = x_BMC.flatten(0, 1).index_select(0, at_IK.flatten()).view(-1, K, C)
    y_IC = (x_IKC * weight_C1K.squeeze(1).t() * (run_IK == run_IK[:, -1:])[..., None]).sum(1) + bias_C
    return y_BLC.flatten(0, 1).index_copy(0, row_I * L + time_I, y_IC).view_as(y_BLC)


def _convolve(x_BMC: Tensor, weight_C1K: Tensor, bias_C: Tensor | None) -> Tensor:
    # Channels stay last: as a conv2d over a transposed view this runs several times faster than conv1d on a CPU.
    x_BC1M = x_BMC.transpose(1, 2).unsqueeze(2)
    return F.conv2d(x_BC1M, weight_C1K.unsqueeze(2), bias_C, groups=len(weight_C1K)).squeeze(2).transpose(1, 2)


class _Convolution(torch.autograd.Function):
    """:func:`_convolve` with its derivative written out: torch's own takes ten times as long as the convolution on a
    CPU, and grows faster than the length. The gradient of x is the same convolution with the taps reversed."""

    @staticmethod
    def forward(ctx, x_BMC: Tensor, weight_C1K: Tensor, bias_C: Tensor) -> Tensor:
        ctx.save_for_backward(x_BMC, weight_C1K)
        return _convolve(x_BMC, weight_C1K, bias_C)

    @staticmethod
    def backward(ctx, grad_BLC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_BMC, weight_C1K = ctx.saved_tensors
        L, K = grad_BLC.shape[1], weight_C1K.shape[-1]
        grad_BMC = _convolve(F.pad(grad_BLC, (0, 0, K - 1, K - 1)), weight_C1K.flip(-1), None)
        grad_CK = torch.stack([(grad_BLC * x_BMC[:, k : k + L]).sum((0, 1)) for k in range(K)], 1)
        return grad_BMC, grad_CK[:, None], grad_BLC.sum((0, 1))


class Mamba2(nn.Module):
    """The Mamba-2 mixer: project in, convolve, run the recurrence, gate and normalise, project out.

    ``y, state = mamba(x_BLD, state, span)`` for any L >= 1; [B, L, D] -> [B, L, D]. The state has a fixed size:
    H * P * N numbers and K - 1 inputs of the convolution, whatever has been read.
    """

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.mamba_num_heads, config.mamba_head_dim
        self.groups, self.state_size = config.n_groups, config.ssm_state_size
        self.inner, self.conv_dim = config.mamba_inner_size, config.conv_dim
        self.chunk_size, self.dt_limit = config.chunk_size, config.time_step_limit
        self.in_proj = nn.Linear(config.hidden_size, self.inner + self.conv_dim + self.heads, bias=False)
        self.conv1d = nn.Conv1d(self.conv_dim, self.conv_dim, config.conv_kernel, groups=self.conv_dim)
        self.A_log = nn.Parameter(torch.zeros(self.heads))  # A = -exp(A_log) < 0: the state can only decay
        self.D = nn.Parameter(torch.ones(self.heads))
        self.dt_bias = nn.Parameter(torch.zeros(self.heads))
        self.norm = GatedRMSNorm(self.inner, self.groups, config.layer_norm_epsilon)
        self.out_proj = nn.Linear(self.inner, config.hidden_size, bias=False)

    def empty_state(self, batch: int, like: Tensor) -> MambaState:
        """The state before the first token: zeros."""
        conv = like.new_zeros(batch, self.conv1d.kernel_size[0] - 1, self.conv_dim)
        ssm = at_least_float32(like.new_zeros(batch, self.heads, self.head_dim, self.state_size))
        return MambaState(conv, ssm)

    def forward(
        self, x_BLD: Tensor, state: MambaState | None = None, span: Span | None = None
    ) -> tuple[Tensor, MambaState]:
        B, L, _ = x_BLD.shape
        span = span or Span.whole(B, L)
        heads, groups, bc = self.heads, self.groups, self.groups * self.state_size
        gate_BLI, xbc_BLC, dt_BLH = self.in_proj(x_BLD).split((self.inner, self.conv_dim, heads), -1)
        state = state or self.empty_state(B, xbc_BLC)

        window_BMC = torch.cat([state.conv_BKC.to(xbc_BLC.dtype), xbc_BLC], 1)
        run_BM = None if span.run_BL is None else F.pad(span.run_BL, (window_BMC.shape[1] - L, 0))
        xbc_BLC = F.silu(causal_conv(window_BMC, self.conv1d.weight, self.conv1d.bias, run_BM))
        conv_BKC = self._last_inputs(window_BMC, run_BM, span)

        x_BLI, Bmat, Cmat = at_least_float32(xbc_BLC).split((self.inner, bc, bc), -1)
        x_BLHP = x_BLI.view(B, L, heads, self.head_dim)
        Bmat_BLGN, Cmat_BLGN = Bmat.view(B, L, groups, self.state_size), Cmat.view(B, L, groups, self.state_size)
        dt_BLH = F.softplus(at_least_float32(dt_BLH) + self.dt_bias)
        if self.dt_limit != (0.0, math.inf):  # a softplus is never outside of that
            dt_BLH = dt_BLH.clamp(*self.dt_limit)
        if span.valid_BL is not None:
            dt_BLH = dt_BLH * span.valid_BL[..., None]
        A_H = -at_least_float32(self.A_log).exp()

        parts = x_BLHP, dt_BLH, A_H, Bmat_BLGN, Cmat_BLGN, state.ssm_BHPN
        with without_autocast(x_BLD):  # its products would be bfloat16, and the state carries their errors on
            if L == 1:
                y_BLHP, ssm_BHPN = ssd_recurrent(*parts, span.run_BL)
            else:
                y_BLHP, ssm_BHPN = ssd_chunked(*parts, self.chunk_size, span.run_BL)
        y_BLHP = torch.addcmul(y_BLHP, x_BLHP, at_least_float32(self.D).view(heads, 1))
        y_BLI = self.norm(y_BLHP.reshape(B, L, self.inner), gate_BLI)
        return self.out_proj(y_BLI.to(x_BLD.dtype)), MambaState(conv_BKC, ssm_BHPN)

    def _last_inputs(self, window_BMC: Tensor, run_BM: Tensor | None, span: Span) -> Tensor:
        """The K - 1 inputs that the next call's convolution will see, zero where they are of an older document."""
        kept, M = self.conv1d.kernel_size[0] - 1, window_BMC.shape[1]
        if not span.padded:
            last_BKC, run_BK = window_BMC[:, M - kept :], None if run_BM is None else run_BM[:, M - kept :]
            run_B1 = None if run_BM is None else run_BM[:, -1:]
        else:
            lengths_B1 = torch.tensor(span.lengths, device=window_BMC.device)[:, None]
            at_BK = lengths_B1 + torch.arange(kept, device=window_BMC.device)
            last_BKC = window_BMC.gather(1, at_BK[..., None].expand(-1, -1, window_BMC.shape[2]))
            run_BK = None if run_BM is None else run_BM.gather(1, at_BK)
            run_B1 = None if run_BM is None else run_BK[:, -1:]
        if run_BK is not None:
            return last_BKC * (run_BK == run_B1)[..., None]
        # a copy, so that a long call's whole window is not kept alive for three of its rows
        return last_BKC.clone() if M > kept + 1 else last_BKC
