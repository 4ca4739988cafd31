"""The KARMMA model, teacher and student alike (arXiv 2504.08578, Sec. III).

    encoders -> tau-average -> one Linear per modality -> fusion block over [CLS] and all tokens
      -> M + 1 output tokens: [CLS] and the mean of each modality's -> shared FC -> one classifier per head on each,
      their predictions averaged per head (`ModelRecipe.average`)

Token reduction (Sec. III-C) averages an encoder's tokens down to at most tau and has no parameters. `encode` processes
each modality alone and `fuse` combines them, so that evaluation encodes a clip once and fuses it once per subset of
modalities.

Legend: B clips, M modalities, N clips that have a modality, T tokens, D width, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from karmma_dist.errors import UserError
from karmma_dist.modalities import MODALITIES
from karmma_dist.models.encoders.encoder import Encoder
from karmma_dist.models.encoders.table import build_encoder, input_shape
from karmma_dist.models.encoders.transformer import INIT_STD, TransformerLayer, at_least_float32, init_linears
from karmma_dist.models.rivals import BottleneckFusion, Filler, MeanTokens, MissingToken, Prompts, head_columns
from karmma_dist.recipe import InputRecipe, ModelRecipe

Grouping = Literal["paper", "even"]


def tau_average(tokens_BTD: Tensor, tau: int, grouping: Grouping = "paper") -> Tensor:
    """Average consecutive tokens in `tau` groups; `tau` tokens or fewer pass unchanged.

    Args:
        tokens_BTD: Tokens, floating point.
        tau: Largest number of tokens in the result, at least 1.
        grouping: "paper": groups of floor(T / tau) and a last group with the rest (784 -> 300: 299 pairs and one
            group of 186); "even": sizes differ by one at most, larger groups first.

    Returns:
        (B, min(T, tau), D) in the dtype of `tokens_BTD`.

    Raises:
        ValueError: `tau` is below 1, or the grouping is unknown.
    """
    if tau < 1:
        raise ValueError(f"tau is {tau}: it must be at least 1")
    if grouping not in ("paper", "even"):
        raise ValueError(f"grouping is '{grouping}': it must be 'paper' or 'even'")
    num_tokens = tokens_BTD.shape[1]
    if num_tokens <= tau:
        return tokens_BTD
    size, rest = divmod(num_tokens, tau)
    if grouping == "paper":
        first, last = tokens_BTD.split([size * (tau - 1), size + rest], dim=1)
        parts = [_group_means(first, tau - 1), _group_means(last, 1)]
    else:
        first, last = tokens_BTD.split([(size + 1) * rest, size * (tau - rest)], dim=1)
        parts = [_group_means(first, rest), _group_means(last, tau - rest)]
    return torch.cat([part for part in parts if part.shape[1]], dim=1)


def _group_means(tokens_BTD: Tensor, num_groups: int) -> Tensor:
    """Average the tokens in `num_groups` equal groups; without groups the result has no tokens."""
    if num_groups == 0:
        return tokens_BTD
    return tokens_BTD.unflatten(1, (num_groups, -1)).mean(dim=2)  # (B, num_groups, D)


class KnownTokens(Protocol):
    """The tokens of a frozen encoder, of which some are known before it runs."""

    @property
    def must_encode(self) -> bool:
        """True if the encoder runs even if no clip needs it: another rank gathers its parameters."""

    def complete(self, encoded_NTD: Tensor | None) -> Tensor:
        """Return the tokens of all clips that have the modality, in batch order, given those of the unknown ones."""


class FusionBlock(nn.Module):
    """A pre-norm transformer with GELU and a final norm [ours: the paper names neither].

    Args:
        width: D.
        num_heads: Number of attention heads.
        num_layers: Number of layers.
        feedforward: Feed-forward width.
        attention_dropout: Dropout on attention weights while training [paper: teacher 0.3, student 0].
    """

    def __init__(
        self, width: int, num_heads: int, num_layers: int, feedforward: int, attention_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.layers = nn.ModuleList(
            TransformerLayer(width, num_heads, feedforward, pre_norm=True, attention_dropout=attention_dropout)
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width)
        init_linears(self)
        nn.init.trunc_normal_(self.cls_token, std=INIT_STD)

    def forward(
        self, tokens_BTD: Tensor, attend_BT: Tensor | None = None, prompts_BLPD: Tensor | None = None
    ) -> Tensor:
        """Mix the tokens of each clip.

        Args:
            tokens_BTD: Tokens of all modalities.
            attend_BT: bool, True = attend to this token; outputs at other tokens are meaningless. None attends to all.
            prompts_BLPD: P tokens that precede the input of each of the first L layers, of a rival; see `Prompts`.

        Returns:
            (B, 1 + T, D), [CLS] first.
        """
        cls = self.cls_token.expand(len(tokens_BTD), -1, -1)
        x = torch.cat([cls, tokens_BTD], dim=1)  # (B, 1 + T, D)
        keys = None if attend_BT is None else nn.functional.pad(attend_BT, (1, 0), value=True)[:, None]  # (B, 1, 1 + T)
        prompts = () if prompts_BLPD is None else prompts_BLPD.unbind(dim=1)
        for depth, layer in enumerate(self.layers):
            if depth < len(prompts):
                x = torch.cat([prompts[depth], x], dim=1)
                keys = None if keys is None else nn.functional.pad(keys, (prompts[depth].shape[1], 0), value=True)
            x = layer(x, keys)
        out: Tensor = self.norm(x[:, -1 - tokens_BTD.shape[1] :] if prompts else x)
        return out


class StandIn(nn.Module):
    """The learnable tokens `t_mod + t_tok_i`: they are added to a present modality's tokens and replace absent ones.

    Args:
        num_tokens: T.
        width: D.
    """

    def __init__(self, num_tokens: int, width: int) -> None:
        super().__init__()
        self.modality_token = nn.Parameter(torch.empty(1, 1, width))
        self.position_token = nn.Parameter(torch.empty(1, num_tokens, width))
        nn.init.trunc_normal_(self.modality_token, std=INIT_STD)
        nn.init.trunc_normal_(self.position_token, std=INIT_STD)

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        """Return (B, T, D); tokens of clips without the modality must be zeros."""
        return tokens_BTD + (self.modality_token + self.position_token)


class KarmmaModel(nn.Module):
    """The KARMMA model: encoders, fusion block and heads.

    With `missing: stand_in` (student) learnable tokens replace an absent modality, so the fusion block's length never
    changes. With `missing: leave_out` (teacher, Baseline) absent tokens are excluded from attention and from the
    averages, and the only learnable token is [CLS]: a modality embedding would only repeat the bias of its Linear, and
    position tokens (0.69 M) would not fit the teacher's published 11.25 M trainable parameters. A model of one modality
    needs no stand-in tokens and has none either (29.64 M for the student on video).

    With `fusion: mean` a model of one modality predicts from the mean of its encoder's tokens with just a linear layer
    per head (arXiv 2307.07483). The other values of `fusion` and `missing` are rivals: see `rivals.py`.

    Args:
        model: Architecture.
        inputs: Sizes of the inputs.
        modalities: Columns of `present_BM`; each has an encoder in `model.encoders`.
        heads: Number of classes by head.

    Raises:
        UserError: an encoder is missing or unknown, an option is unknown, or `fusion: mean` has several modalities.
    """

    num_tokens: dict[str, int]
    """Number of tokens in the fusion block, by modality."""
    width: int
    """Width of those tokens."""
    runs_every_encoder: bool = False
    """True if encoders of modalities that no clip has run even without gradients: if parameters are sharded over ranks,
    all ranks must gather the same ones."""
    _like: Tensor

    def __init__(
        self, model: ModelRecipe, inputs: InputRecipe, modalities: Sequence[str], heads: dict[str, int]
    ) -> None:
        super().__init__()
        missing = [modality for modality in modalities if modality not in model.encoders]
        if missing or not modalities:
            raise UserError(f"model.encoders: no encoder for modality '{missing[0]}'" if missing else "no modality")
        if model.fusion == "mean" and len(modalities) > 1:
            raise UserError(f"model.fusion mean is for one modality, not for {', '.join(modalities)}")
        if not heads:
            raise UserError("the model has no head: the clips carry no label to learn")
        self.recipe, self.inputs = model, inputs
        self.modalities, self.heads = tuple(modalities), dict(heads)
        encoders = {m: build_encoder(m, model.encoders[m], inputs) for m in modalities}
        self.encoders = nn.ModuleDict(encoders)
        is_pooled, is_late = model.fusion == "mean", model.fusion == "late"
        self.num_tokens = {m: 1 if is_pooled else min(e.num_tokens, model.tau) for m, e in encoders.items()}
        self.frozen = frozenset(m for m in modalities if model.encoders[m].frozen)
        self.width = encoders[modalities[0]].width if is_pooled else sum(heads.values()) if is_late else model.width
        self.projections = nn.ModuleDict(
            {m: nn.Identity() if is_pooled else nn.Linear(e.width, self.width) for m, e in encoders.items()}
        )
        self.leaves_out = model.missing in ("leave_out", "prompts")
        standing_in = () if model.missing != "stand_in" or len(modalities) == 1 else modalities
        self.stand_ins = nn.ModuleDict({m: StandIn(self.num_tokens[m], model.width) for m in standing_in})
        self.fusion = _build_fusion(model, len(modalities))
        self.shared = None if is_pooled or is_late else nn.Linear(model.width, model.fc_width)
        features = self.width if is_pooled else model.fc_width
        self.classifiers = nn.ModuleDict(
            head_columns(heads) if is_late else {head: nn.Linear(features, num) for head, num in heads.items()}
        )
        filled = modalities if model.missing in ("mean", "token") and len(modalities) > 1 else ()
        self.fillers = nn.ModuleDict({m: self._build_filler(m) for m in filled})
        self.prompts = None if model.missing != "prompts" else Prompts(
            len(modalities), model.num_prompt_layers, model.prompt_length, model.width
        )
        # Gives device and dtype. Reading a parameter would gather it if parameters are sharded over ranks.
        self.register_buffer("_like", torch.zeros(()), persistent=False)
        for part in (self.projections, self.shared, self.classifiers):
            if part is not None:
                init_linears(part)
        for modality in self.frozen:
            self.encoders[modality].requires_grad_(False)
        self.train(self.training)

    def _build_filler(self, modality: str) -> Filler:
        if self.recipe.missing == "token":
            return MissingToken(self.width)
        num, width = self.num_tokens[modality], self.encoder_width(modality)
        return MeanTokens(num, width, frozen=modality in self.frozen)

    @property
    def fusion_block(self) -> FusionBlock:
        """The fusion block.

        Raises:
            UserError: the model has another `fusion` than `transformer` and thus no fusion block.
        """
        if not isinstance(self.fusion, FusionBlock):
            raise UserError(f"a model with model.fusion {self.recipe.fusion} has no fusion block")
        return self.fusion

    @property
    def _runs_every_part(self) -> bool:
        """True if all ranks must gather the same parameters, of which fusion has some for each modality."""
        return self.runs_every_encoder and isinstance(self.fusion, BottleneckFusion)

    def with_heads(self, heads: Mapping[str, str]) -> KarmmaModel:
        """Return a model of the same modules, not copied, that has only some of the heads: for one dataset of several.

        Args:
            heads: This model's heads, by the names that the other model has for them.
        """
        model = copy.copy(self)
        classifiers = nn.ModuleDict({name: self.classifiers[head] for name, head in heads.items()})
        model._modules = {**self._modules, "classifiers": classifiers}
        model.heads = {name: self.heads[head] for name, head in heads.items()}
        return model

    def train(self, mode: bool = True) -> KarmmaModel:
        """Set the mode of all modules except frozen encoders, which stay in eval mode."""
        super().train(mode)
        for modality in self.frozen:
            self.encoders[modality].eval()
        return self

    def forward(
        self, inputs: dict[str, Tensor], present_BM: Tensor, known: Mapping[str, KnownTokens] | None = None
    ) -> dict[str, Tensor]:
        """Return logits (B, C) by head; see `encode` and `fuse`."""
        return self.fuse(self.encode(inputs, present_BM, known), present_BM)

    def encode(
        self, inputs: dict[str, Tensor], present_BM: Tensor, known: Mapping[str, KnownTokens] | None = None
    ) -> dict[str, Tensor]:
        """Run each encoder on the clips that have its modality and whose tokens are not known.

        In training, and with `runs_every_encoder`, the encoder of a modality that no clip has runs on one clip of
        zeros, whose tokens are discarded: its parameters then get zero gradients at the same point of the backward
        pass as on ranks with present clips. ZeRO reduces gradients in the order of their arrival, which must be the
        same on all ranks.

        Args:
            inputs: Present clips only, in batch order, by modality, of `table.input_shape` and the dtype of the
                parameters; a modality that no clip has may be missing. Only shapes and dtypes are checked, so that
                the check does not wait for the device.
            present_BM: bool, True = the clip has the modality; on any device.
            known: Known tokens of frozen encoders, by modality; `inputs` then hold only the clips whose tokens are not
                known.

        Returns:
            Tokens (N, T, D) by modality, after encoder, tau-average and Linear; with `fusion: mean` their mean,
            (N, 1, D). With `fusion: late` the Linear gives the logits of all heads.

        Raises:
            ValueError: `present_BM` and `inputs` disagree, or an input has another shape or dtype, or a modality that
                the model does not have.
        """
        present = self._on_cpu(present_BM, "present_BM")
        self._check_inputs(inputs)
        tokens = {}
        for modality, num in zip(self.modalities, present.sum(dim=0).tolist(), strict=True):
            x = inputs.get(modality)
            given = 0 if x is None else len(x)
            source = None if known is None else known.get(modality)
            if given > num or (given != num and source is None):
                raise ValueError(f"inputs['{modality}'] holds {given} clips, but present_BM says {num}")
            if source is not None:
                reduced = self._complete(modality, x if given else None, source, num)
            elif x is not None and num:
                reduced = self._reduce(modality, x)
            elif self.runs_every_encoder or (self.training and torch.is_grad_enabled()):
                reduced = self._reduce(modality, self.blank_clip(modality))
            else:
                continue
            if num and modality in self.fillers and self.training and torch.is_grad_enabled():
                cast(Filler, self.fillers[modality]).observe(reduced)
            projected = self.projections[modality](reduced)
            tokens[modality] = projected if num else projected[:0]
        return tokens

    def _complete(self, modality: str, x: Tensor | None, source: KnownTokens, num: int) -> Tensor:
        """Return the tokens of all `num` clips, known or encoded, as `_reduce` does; those of one blank clip for none.
        """
        encoded = None if x is None else self._reduce(modality, x)
        if x is None and source.must_encode:
            self._reduce(modality, self.blank_clip(modality))
        if num:
            return source.complete(encoded)
        return self._like.new_zeros(1, self.num_tokens[modality], self.encoder_width(modality))

    def _reduce(self, modality: str, x: Tensor) -> Tensor:
        """Encode one modality of N clips to (N, T, width of the encoder), tau-averaged."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and modality not in self.frozen):
            tokens: Tensor = self.encoders[modality](x)
            if self.recipe.fusion == "mean":
                return tokens.mean(dim=1, keepdim=True)
            return tau_average(tokens, self.recipe.tau, self.recipe.grouping)

    def blank_clip(self, modality: str) -> Tensor:
        """Return the input of one clip of zeros, (1, ...)."""
        return self._like.new_zeros(1, *input_shape(modality, self.inputs))

    def encoder_width(self, modality: str) -> int:
        """Return the width of a modality's tokens before the Linear."""
        encoder = self.encoders[modality]
        assert isinstance(encoder, Encoder)
        return encoder.width

    def fuse(
        self, tokens: dict[str, Tensor], present_BM: Tensor, keep_BM: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Predict from the tokens of the kept modalities.

        Args:
            tokens: Result of `encode` for `present_BM`.
            present_BM: bool, the argument of `encode`.
            keep_BM: bool, subset of `present_BM`: the modalities to use. None uses all present ones.

        Returns:
            Logits (B, C) by head. A clip's logits do not depend on the other clips of the batch.

        Raises:
            ValueError: a clip keeps no modality or one it does not have (the message gives its position), or `tokens`
                do not belong to `present_BM`.
        """
        present = self._on_cpu(present_BM, "present_BM")
        keep = present if keep_BM is None else self._on_cpu(keep_BM, "keep_BM")
        _check_keep(keep, present)
        # Without gradients, positions that no clip attends to can be dropped; with gradients the graph must not change.
        drops = self.leaves_out and not torch.is_grad_enabled() and not self._runs_every_part
        used = [m for m in range(len(self.modalities)) if not drops or bool(keep[:, m].any())]
        parts = [self._place(self.modalities[m], tokens, present[:, m], keep[:, m]) for m in used]
        counted = keep[:, used] if self.leaves_out else torch.ones_like(keep[:, used])
        if isinstance(self.fusion, FusionBlock):
            prompts = None if self.prompts is None else self.prompts(keep)
            outputs = self._mix(self.fusion, parts, counted, prompts)
            counted = F.pad(counted, (1, 0), value=True)
        elif self.fusion is not None:
            outputs = self.fusion(parts, used, counted)
        else:
            outputs = torch.cat([part.mean(dim=1, keepdim=True) for part in parts], dim=1)
        counted = counted.to(outputs)
        return self._predict(outputs, counted / counted.sum(dim=1, keepdim=True))

    def _mix(
        self, block: FusionBlock, parts: list[Tensor], counted_BM: Tensor, prompts_BLPD: Tensor | None
    ) -> Tensor:
        """Return [CLS] and the mean of each modality's tokens after the fusion block, (B, M + 1, D)."""
        lengths, attend_BT = [part.shape[1] for part in parts], None
        if not bool(counted_BM.all()):
            attend_BT = counted_BM.repeat_interleave(torch.tensor(lengths), dim=1).to(parts[0].device)
        cls_B1D, *rest = block(torch.cat(parts, dim=1), attend_BT, prompts_BLPD).split([1, *lengths], dim=1)
        return torch.cat([cls_B1D, *(part.mean(dim=1, keepdim=True) for part in rest)], dim=1)

    def _place(self, modality: str, tokens: dict[str, Tensor], present_B: Tensor, keep_B: Tensor) -> Tensor:
        """Bring tokens of N clips into batch order, (B, T, D), with zeros, or what replaces them, for other clips."""
        shape = (self.num_tokens[modality], self.width)
        given = tokens.get(modality, self._like.new_zeros(0, *shape))
        num = int(present_B.sum())
        if given.shape != (num, *shape):
            raise ValueError(f"tokens['{modality}'] are {tuple(given.shape)}, expected {(num, *shape)}")
        padded = torch.cat([given, given.new_zeros(1, *shape)])
        rows_B = torch.where(keep_B, present_B.cumsum(dim=0) - 1, num)
        placed = padded.index_select(0, rows_B.to(padded.device))
        if modality in self.stand_ins:
            return cast(Tensor, self.stand_ins[modality](placed))
        if modality in self.fillers:
            return cast(Tensor, self.fillers[modality](placed, keep_B, self.projections[modality]))
        return placed

    def _predict(self, outputs_BMD: Tensor, weights_BM: Tensor) -> dict[str, Tensor]:
        """Average the predictions of the M + 1 output tokens with weights that sum to 1: (B, C) by head.

        Averaged probabilities are returned as logarithms: their softmax gives the probabilities.
        """
        hidden = outputs_BMD if self.shared is None else F.gelu(self.shared(outputs_BMD))  # (B, M + 1, FC width)
        weights = weights_BM[:, :, None]
        if self.recipe.average == "logits":
            return {head: (classifier(hidden) * weights).sum(dim=1) for head, classifier in self.classifiers.items()}
        log_weights = at_least_float32(weights).log()  # -inf for tokens with weight 0: they get no gradient either
        return {
            head: torch.logsumexp(at_least_float32(logits).log_softmax(dim=-1) + log_weights, dim=1).to(hidden.dtype)
            for head, logits in ((head, classifier(hidden)) for head, classifier in self.classifiers.items())
        }

    def _check_inputs(self, inputs: dict[str, Tensor]) -> None:
        for modality, given in inputs.items():
            if modality not in self.modalities:
                raise ValueError(
                    f"inputs['{modality}']: the model has no such modality; it has {', '.join(self.modalities)}"
                )
            expected = input_shape(modality, self.inputs)
            if given.shape[1:] != expected:
                shape = f"(N, {', '.join(map(str, expected))})"
                raise ValueError(
                    f"inputs['{modality}'] is {tuple(given.shape)}, expected {shape}, which is "
                    f"{MODALITIES[modality].layout}"
                )
            if given.dtype != self._like.dtype and not _autocast_takes(given):
                raise ValueError(f"inputs['{modality}'] is {given.dtype}, expected {self._like.dtype}, the parameters'")

    def _on_cpu(self, flags_BM: Tensor, name: str) -> Tensor:
        if flags_BM.dtype != torch.bool or flags_BM.ndim != 2 or flags_BM.shape[1] != len(self.modalities):
            raise ValueError(
                f"{name} is {flags_BM.dtype} {tuple(flags_BM.shape)}, expected torch.bool (B, {len(self.modalities)})"
            )
        return flags_BM.cpu()


def _build_fusion(model: ModelRecipe, num_modalities: int) -> FusionBlock | BottleneckFusion | None:
    """Return what mixes the tokens; None: each modality's are averaged."""
    if model.fusion in ("mean", "late"):
        return None
    sizes = model.width, model.num_heads, model.num_layers, model.feedforward, model.attention_dropout
    if model.fusion == "transformer":
        return FusionBlock(*sizes)
    return BottleneckFusion(num_modalities, *sizes, num_tokens=model.bottleneck_tokens, first=model.bottleneck_from)


def _autocast_takes(x: Tensor) -> bool:
    return x.is_floating_point() and torch.is_autocast_enabled(x.device.type)


def _check_keep(keep_BM: Tensor, present_BM: Tensor) -> None:
    if keep_BM.shape != present_BM.shape:
        raise ValueError(f"keep_BM is {tuple(keep_BM.shape)}, present_BM {tuple(present_BM.shape)}")
    invented = (keep_BM & ~present_BM).any(dim=1).nonzero().flatten().tolist()
    if invented:
        raise ValueError(f"clip {invented[0]} of the batch keeps a modality that it does not have")
    empty = (~keep_BM.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"clip {empty[0]} of the batch keeps no modality: every clip needs one")
