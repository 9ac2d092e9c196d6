"""HybridLM: embeddings, a stack of pre-norm blocks, a final norm, an output head, and the MTP block beside them.

Parameter names and shapes are those that transformers' ``NemotronHForCausalLM`` has in memory (experts stacked),
so weights move by name; ``mtp.*`` follows the released checkpoints.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import HybridConfig
from .layers import MLP, Attention, Mamba2, MoE, MTPBlock, RMSNorm
from .layers.norm import at_least_float32
from .packing import make_span
from .state import HybridState, KVState, LayerState, MambaState, Span

MAX_LOGIT_BYTES = 64_000_000


@dataclass(frozen=True)
class Output:
    """What a call returns.

    logits      [B, L, V] ([B, 1, V] with last_only), at least float32
    state       the state after the call's tokens
    hidden_BLD  the trunk's output after its final norm: what the MTP block reads
    """

    logits: Tensor
    state: HybridState
    hidden_BLD: Tensor


class Block(nn.Module):
    """``x + mixer(norm(x))`` with the mixer that the layer's letter names."""

    def __init__(self, config: HybridConfig, letter: str) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        if letter == "-":
            self.mixer: nn.Module = MLP(config.hidden_size, config.intermediate_size)
        else:
            self.mixer = {"M": Mamba2, "*": Attention, "E": MoE}[letter](config)
        self.remembers = letter in "M*"

    def forward(self, x_BLD: Tensor, state: LayerState, span: Span) -> tuple[Tensor, LayerState]:
        if self.remembers:
            y_BLD, state = self.mixer(self.norm(x_BLD), state, span)
        else:
            y_BLD = self.mixer(self.norm(x_BLD))
        return x_BLD + y_BLD, state


class Trunk(nn.Module):
    """Embeddings, blocks and final norm: ids [B, L] -> hidden [B, L, D]."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, letter) for letter in config.hybrid_override_pattern)
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.recompute = False  # in training: keep each block's input only, and compute the rest again (activation checkpointing)

    def forward(
        self, ids_BL: Tensor, states: Sequence[LayerState], span: Span
    ) -> tuple[Tensor, tuple[LayerState, ...]]:
        x_BLD, new = self.embeddings(ids_BL), []
        for layer, state in zip(self.layers, states, strict=True):
            if self.recompute and torch.is_grad_enabled():
                x_BLD, state = checkpoint(layer, x_BLD, state, span, use_reentrant=False)
            else:
                x_BLD, state = layer(x_BLD, state, span)
            new.append(state)
        return self.norm_f(x_BLD), tuple(new)


class HybridLM(nn.Module):
    """A Nemotron-H language model of any size.

    Parameters
    ----------
    config : the sizes
    device, dtype : where and how the weights are made; "meta" makes none and counts instantly

    Weights start as NVIDIA's Megatron-LM starts them: normal with ``initializer_range``, projections that write to
    the residual stream divided by sqrt(layers), A uniform in [1, 16], dt log-uniform in [time_step_min,
    time_step_max], D = 1.
    """

    def __init__(
        self, config: HybridConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        with torch.device(device or torch.get_default_device()):
            self.model = Trunk(config)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.mtp = MTPBlock(config) if config.num_nextn_predict_layers else None
            if not self.lm_head.weight.is_meta:
                self.reset_parameters()
        if dtype is not None:
            self.to(dtype)

    def forward(
        self,
        ids: Tensor,
        state: HybridState | None = None,
        lengths: Sequence[int] | Tensor | None = None,
        segment_ids: Tensor | None = None,
        last_only: bool = False,
    ) -> Output:
        """Logits for every token of ``ids`` [B, L], L >= 1, and the state after them.

        state        of earlier calls; any split of a sequence into calls gives the same logits, to rounding
        lengths      real tokens a row, for right-padded batches; logits at padding mean nothing
        segment_ids  [B, L] document of each token, for packed rows: nothing passes from one document to the next.
                     Give it from the first call on; an id that comes back later is a new document
        last_only    logits of each row's last real token only, [B, 1, V]

        Raises ValueError for ids that are not in the vocabulary, for an empty call, and for mismatched shapes.
        """
        self._check_ids(ids)
        self._check_state(state)
        span, document_B, started_B = make_span(ids, state, lengths, segment_ids)
        states = state.layers if state else (None,) * len(self.model.layers)
        hidden_BLD, new = self.model(ids, states, span)
        read_BLD = _last(hidden_BLD, span) if last_only else hidden_BLD
        logits = at_least_float32(self.lm_head(read_BLD))
        return Output(logits, HybridState(new, span.total, document_B, started_B), hidden_BLD)

    def loss(
        self, ids: Tensor, targets: Tensor,
        lengths: Sequence[int] | Tensor | None = None, segment_ids: Tensor | None = None,
    ) -> Tensor:
        """:func:`lm_loss` of the model's logits, computed in slices of at most 64 MB of logits.

        ``targets`` [B, L] are already shifted (targets[b, t] is the token after ids[b, t]); -100 is ignored, and so
        is padding.
        """
        return self._losses(ids, targets, lengths, segment_ids, mtp=False)[0]

    def losses(
        self, ids: Tensor, targets: Tensor,
        lengths: Sequence[int] | Tensor | None = None, segment_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """:meth:`loss`, and the same for the MTP block's guesses, from one pass through the trunk.

        At position t the block reads the token ids[b, t] and the trunk's state of t - 1 (zeros at the start of a
        sequence or document), and is asked for targets[b, t] as the trunk is: the trunk has seen one token more of
        the past in its own state, so the second loss is the higher one. Raises ValueError without an MTP block.
        """
        self._check_mtp()
        main, mtp = self._losses(ids, targets, lengths, segment_ids, mtp=True)
        assert mtp is not None
        return main, mtp

    def _losses(
        self, ids: Tensor, targets: Tensor, lengths: Sequence[int] | Tensor | None, segment_ids: Tensor | None,
        mtp: bool,
    ) -> tuple[Tensor, Tensor | None]:
        self._check_ids(ids)
        if targets.shape != ids.shape:
            raise ValueError(f"targets {tuple(targets.shape)} must have the shape of ids {tuple(ids.shape)}")
        span, *_ = make_span(ids, None, lengths, segment_ids)
        if span.valid_BL is not None:
            targets = targets.masked_fill(~span.valid_BL, -100)
        hidden_BLD, _ = self.model(ids, (None,) * len(self.model.layers), span)
        main = self._head_loss(hidden_BLD, targets)
        if not mtp:
            return main, None
        before_BLD = F.pad(hidden_BLD[:, :-1], (0, 0, 1, 0))
        if span.first_key_BL is not None:  # packed documents: the last token of one is not the past of the next
            first_BL = span.first_key_BL == torch.arange(ids.shape[1], device=ids.device)
            before_BLD = before_BLD.masked_fill(first_BL[..., None], 0)
        guess_BLD, _ = self.mtp(self.model.embeddings(ids), before_BLD, None, span)
        return main, self._head_loss(guess_BLD, targets)

    def _head_loss(self, hidden_BLD: Tensor, targets: Tensor) -> Tensor:
        hidden_TD, targets_T = hidden_BLD.flatten(0, 1), targets.flatten()
        total = at_least_float32(hidden_TD.new_zeros(()))
        rows = max(1, MAX_LOGIT_BYTES // (total.element_size() * self.config.vocab_size))
        for h_TD, t_T in zip(hidden_TD.split(rows), targets_T.split(rows)):
            if torch.is_grad_enabled() and len(hidden_TD) > rows:
                total = total + checkpoint(self._loss_sum, h_TD, t_T, use_reentrant=False)
            else:
                total = total + self._loss_sum(h_TD, t_T)
        return total / (targets_T != -100).sum().clamp(min=1)

    def _loss_sum(self, hidden_TD: Tensor, targets_T: Tensor) -> Tensor:
        return _cross_entropy_sum(self.lm_head(hidden_TD), targets_T)

    def draft(self, ids: Tensor, hidden_BLD: Tensor, state: KVState | None = None) -> tuple[Tensor, Tensor, KVState]:
        """One application of the MTP block: guesses for the token after ``ids``, given the state before them.

        hidden_BLD[:, p] belongs to the token before ids[:, p] (zeros before the first token): ``Output.hidden_BLD``
        on the first application, the returned hidden on later ones. Returns logits [B, L, V], hidden, KV state.
        """
        self._check_mtp()
        self._check_ids(ids)
        hidden_BLD, state = self.mtp(self.model.embeddings(ids), hidden_BLD, state)
        return at_least_float32(self.lm_head(hidden_BLD)), hidden_BLD, state

    def _check_mtp(self) -> None:
        if self.mtp is None:
            raise ValueError("this model has no MTP block; set num_nextn_predict_layers=1 in its config")

    def _check_state(self, state: HybridState | None) -> None:
        if state is None:
            return
        if not isinstance(state, HybridState):
            raise ValueError(f"state must be a HybridState, such as out.state, not {type(state).__name__}")
        kinds = {"M": MambaState, "*": KVState}
        pattern = self.config.hybrid_override_pattern
        wanted = [kinds.get(letter, type(None)) for letter in pattern]
        if [type(layer) for layer in state.layers] != wanted:
            raise ValueError(f"the state is of another model than this one with its layers {pattern}")

    def _check_ids(self, ids: Tensor) -> None:
        if not isinstance(ids, Tensor):
            raise ValueError(f"ids must be a tensor [batch, length], not {type(ids).__name__}")
        if ids.dim() != 2 or ids.shape[0] == 0 or ids.shape[1] == 0:
            raise ValueError(f"ids must be [batch, length] with at least one token, not {tuple(ids.shape)}")
        if ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"ids must be int64 or int32, not {str(ids.dtype).removeprefix('torch.')}")
        # On a GPU the check waits for the device: worth it for a prompt, not for every decoded token.
        if not ids.is_meta and (ids.device.type == "cpu" or ids.shape[1] > 1):
            low, high = (int(x) for x in ids.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                wrong = low if low < 0 else high
                raise ValueError(f"token id {wrong} is outside the vocabulary 0..{self.config.vocab_size - 1}; "
                                 "was the text encoded with another tokenizer?")

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew (see the class); norms and D become 1, router biases 0."""
        config = self.config
        for buffer in self.buffers():
            buffer.zero_()
        std, layers = config.initializer_range, config.num_hidden_layers
        small = std / math.sqrt(layers) if config.rescale_prenorm_residual else std
        writes = ("o_proj.weight", "out_proj.weight", "down_proj.weight", "experts.down_proj", "fc2_latent_proj.weight")
        for name, p in self.named_parameters():
            if name.endswith("A_log"):
                p.uniform_(1, 16).log_()
            elif name.endswith("dt_bias"):
                low, high = math.log(config.time_step_min), math.log(config.time_step_max)
                dt = p.uniform_(low, high).exp_().clamp_(min=config.time_step_floor)
                p.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus backwards
            elif ".conv1d." in name:  # as torch starts a convolution with this many taps a channel
                p.uniform_(-config.conv_kernel**-0.5, config.conv_kernel**-0.5)
            elif p.dim() == 1:
                p.fill_(1)
            else:
                p.normal_(0.0, small if name.endswith(writes) else std)


def _last(x_BLD: Tensor, span: Span) -> Tensor:
    """[B, 1, D] at each row's last real token (the first one for a row that has none)."""
    if not span.padded:
        return x_BLD[:, -1:]
    at_B = torch.tensor(span.lengths, device=x_BLD.device).clamp(min=1) - 1
    return x_BLD[torch.arange(len(at_B), device=x_BLD.device), at_B][:, None]


def lm_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of logits [..., V] against targets [...], which are already shifted; -100 is
    ignored, and a batch of nothing else gives 0."""
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"targets {tuple(targets.shape)} must have the shape of logits without V, "
                         f"{tuple(logits.shape[:-1])}")
    return _cross_entropy_sum(logits.flatten(0, -2), targets.flatten()) / (targets != -100).sum().clamp(min=1)


def _cross_entropy_sum(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    return F.cross_entropy(at_least_float32(logits_TV), targets_T.long(), ignore_index=-100, reduction="sum")
