"""``TransformerLM``: a decoder-only Transformer language model whose layers drop."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerdrop_fast._checks import check_choice, check_count, check_integer, check_rate
from layerdrop_fast.models.adaptive import AdaptiveEmbedding, check_cutoffs, sinusoidal_positions
from layerdrop_fast.models.adaptive import losses as adaptive_losses
from layerdrop_fast.models.generation import Sampler
from layerdrop_fast.nn import KVCache, TransformerStack
from layerdrop_fast.nn.modes import evaluating
from layerdrop_fast.nn.parts import Rates

POSITIONS = ("learned", "sinusoidal")


class TransformerLM(nn.Module):
    """A decoder-only Transformer language model with LayerDrop: the logits of each next token.

    Token embeddings, positions, ``num_layers`` causal pre-norm layers in a TransformerStack (``self.stack``), a final
    norm, a linear head or, with ``cutoffs``, an adaptive softmax that shares its tables with the embeddings.
    ``prune.extract(model, prune.every_other(num_layers, kept=r))`` cuts it to r layers.

    Shapes:
        tokens: int64 [B, S], S <= max_len -> logits [B, S, vocab_size]; with ``cutoffs`` they are log-probabilities

    Args:
        vocab_size: number of tokens; 256 for bytes.
        d_model: width D of the residual stream, a multiple of ``nhead``.
        nhead: attention heads.
        num_layers: layers.
        dim_feedforward: hidden width of the feed-forward branch.
        max_len: the longest sequence; with ``rope_theta`` it may be None, for any length.
        dropout: rate of ordinary dropout behind the embeddings and behind each branch, in [0, 1].
        attention_dropout, activation_dropout: of attention weights, and behind the activation.
        schedule, granularity, target, sampling, scale, seed, accumulation, max_kept: TransformerStack's.
            ``schedule=0.0`` is the dense model.
        norm, activation, num_kv_heads, recompute: of each TransformerLayer; ``norm`` is the final norm's too.
        rope_theta: base of rotary positions, instead of ``positions``.
        positions: ``"learned"`` or ``"sinusoidal"`` embeddings, added to those of the tokens.
        cutoffs: where the bands of an adaptive softmax begin, ascending, for tokens numbered by falling frequency; the
            widths fall by 4 from band to band (Baevski & Auli 2019). None: one band.
        final_norm: whether there is a norm behind the last layer.

    Raises:
        ValueError: a number out of range; at the call, a sequence longer than ``max_len``.
        TypeError: a number of another kind.

    State dict: token_embedding.weight (with ``cutoffs`` token_embedding.projection.weight), position_embedding.weight
    where positions are learned, TransformerStack's under ``stack.``, norm, head.weight (with ``cutoffs`` those of
    nn.AdaptiveLogSoftmaxWithLoss under ``head.``).

    Randomness: weights come from torch's generator, as do the dropout behind the embeddings and of attention weights;
    the layers' decisions and all other masks from the stack's counters alone.

    Source: Radford et al. 2019; Baevski & Auli 2019 (arXiv 1809.10853); Fan, Grave, Joulin 2019.
    """

    sinusoids: Tensor | None

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        nhead: int,
        num_layers: int,
        dim_feedforward: int,
        *,
        max_len: int | None = None,
        dropout: float = 0.1,
        attention_dropout: float = 0.0,
        activation_dropout: float = 0.0,
        schedule: Rates | Mapping[str, Rates] = 0.2,
        granularity: str = "batch",
        target: str = "layer",
        sampling: str = "bernoulli",
        scale: str = "none",
        seed: int | None = None,
        accumulation: int = 1,
        max_kept: int | None = None,
        norm: str = "layernorm",
        activation: str = "gelu",
        num_kv_heads: int | None = None,
        rope_theta: float | None = None,
        recompute: str | None = None,
        ffn_chunks: int = 8,
        positions: str = "learned",
        cutoffs: Sequence[int] | None = None,
        final_norm: bool = True,
    ) -> None:
        super().__init__()
        sizes = {"vocab_size": vocab_size, "d_model": d_model, "nhead": nhead, "num_layers": num_layers}
        for name, size in (sizes | {"dim_feedforward": dim_feedforward}).items():
            check_count(size, name, 1)
        if d_model % nhead:
            raise ValueError(f"d_model is {d_model}, expected a multiple of nhead, {nhead}")
        if max_len is not None:
            check_count(max_len, "max_len", 1)
        elif rope_theta is None:
            raise ValueError("max_len is None without rope_theta, expected how many positions there are")
        check_choice(positions, "positions", POSITIONS)
        self.max_len, self.vocab_size = max_len, vocab_size
        self.dropout = check_rate(dropout, "dropout")
        self.token_embedding = nn.Embedding(vocab_size, d_model) if cutoffs is None else AdaptiveEmbedding(d_model)
        self.position_embedding: nn.Embedding | None = None
        self.register_buffer("sinusoids", None, persistent=False)
        if max_len is not None and rope_theta is None:
            if positions == "learned":
                self.position_embedding = nn.Embedding(max_len, d_model)
            else:
                self.sinusoids = sinusoidal_positions(max_len, d_model)
        layer: dict[str, Any] = {"activation": activation, "norm": norm, "attention_dropout": attention_dropout}
        layer |= {"activation_dropout": activation_dropout, "num_kv_heads": num_kv_heads, "rope_theta": rope_theta}
        drop: dict[str, Any] = {"schedule": schedule, "granularity": granularity, "target": target, "scale": scale}
        drop |= {"sampling": sampling, "seed": seed, "accumulation": accumulation, "max_kept": max_kept}
        drop |= {"ffn_chunks": ffn_chunks}
        self.stack = TransformerStack(
            num_layers, d_model, nhead, dim_feedforward, self.dropout, recompute=recompute, **layer, **drop
        )
        self.norm: nn.Module = nn.Identity()
        if final_norm:
            self.norm = nn.RMSNorm(d_model, 1e-5) if norm == "rmsnorm" else nn.LayerNorm(d_model)
        self.head: nn.Linear | nn.AdaptiveLogSoftmaxWithLoss = nn.Linear(d_model, vocab_size, bias=False)
        if cutoffs is not None:
            self.head = nn.AdaptiveLogSoftmaxWithLoss(d_model, vocab_size, check_cutoffs(cutoffs, vocab_size, d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all weights anew from torch's generator.

        Matrices are normal with variance 1 / fan_in; the two that end a branch with 1 / (2 L fan_in), so that the
        residual stream of a network of any depth starts at about twice the variance of its embeddings (Radford et al.
        2019, section 2.3).
        """
        branches = 2 * len(self.stack.layers)
        for name, weight in self.named_parameters():
            if name.endswith("embedding.weight"):
                nn.init.normal_(weight, std=0.5)
            elif weight.dim() == 2:
                ends_branch = name.endswith(("out_proj.weight", "linear2.weight"))
                nn.init.normal_(weight, std=math.sqrt(1 / weight.shape[1] / (branches if ends_branch else 1)))
            elif "norm" in name and name.endswith("weight"):
                nn.init.ones_(weight)
            else:
                nn.init.zeros_(weight)

    def forward(self, tokens: Tensor, *, cache: KVCache | None = None) -> Tensor:
        """The logits of each next token.

        Args:
            cache: evaluation only: tokens continue those that the cache has read; they are read into it too.
        """
        return self._logits(self._stream(tokens, cache))

    def loss(self, tokens: Tensor, targets: Tensor, *, per_sample: bool = False) -> Tensor:
        """The mean cross-entropy of the next tokens, in nats, without the logits of all tokens where there are bands.

        Shapes:
            tokens, targets: int64 [B, S] -> float []; ``per_sample`` [B], the mean over each sample's S tokens
        """
        x = self.norm(self._stream(tokens, None)).flatten(0, 1)
        if isinstance(self.head, nn.AdaptiveLogSoftmaxWithLoss):
            found = adaptive_losses(self.head, x, targets.flatten())
            return found.view(targets.shape).mean(1) if per_sample else found.mean()
        logits = self.head(x)
        if not per_sample:
            return F.cross_entropy(logits, targets.flatten())
        return F.cross_entropy(logits, targets.flatten(), reduction="none").view(targets.shape).mean(1)

    def _logits(self, x: Tensor) -> Tensor:
        """Of a stream [..., D]."""
        x = self.norm(x)
        if isinstance(self.head, nn.AdaptiveLogSoftmaxWithLoss):
            return self.head.log_prob(x.flatten(0, -2)).unflatten(0, x.shape[:-1])  # type: ignore[no-any-return]
        return self.head(x)  # type: ignore[no-any-return]

    def _stream(self, tokens: Tensor, cache: KVCache | None) -> Tensor:
        """The residual stream behind the last layer."""
        past = 0 if cache is None else cache.length
        length = tokens.shape[-1] if tokens.dim() else 0
        if tokens.dim() != 2 or (self.max_len is not None and past + length > self.max_len):
            expected = "[B, S]" if self.max_len is None else f"[B, S] with S <= {self.max_len - past}"
            behind = f" behind {past} in the cache" if past else ""
            raise ValueError(f"tokens have shape {list(tokens.shape)}{behind}, expected {expected}")
        bands = (self.head,) if isinstance(self.token_embedding, AdaptiveEmbedding) else ()
        x = self.token_embedding(tokens, *bands)
        table = self.sinusoids if self.position_embedding is None else self.position_embedding.weight
        if table is not None:
            x = x + table[past : past + length]
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        return self.stack(x, is_causal=True, cache=cache)  # type: ignore[no-any-return]

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos: int | None = None,
        generator: torch.Generator | None = None,
        use_cache: bool = True,
    ) -> Tensor:
        """Continues each sample, token by token, in evaluation mode; afterwards every module is in the mode it was in.

        Shapes:
            tokens: int64 [B, S], S >= 1 -> int64 [B, S + N], the same tokens and the new ones

        Args:
            max_new_tokens: N, at least 0; less where every sample has ended.
            temperature: divides the logits, at least 0; 0 takes the likeliest token.
            top_k: draw from the k likeliest tokens only.
            top_p: draw from the likeliest tokens that together have probability p only, in (0, 1].
            eos: the token that ends a sample, which is then filled up with it.
            generator: draws, torch's own if None.
            use_cache: keep keys and values, so that a token costs one position and not all; the tokens are the same
                up to rounding.

        Raises:
            ValueError: a number out of range; more than ``max_len`` tokens in the end. TypeError: one of another kind.

        Randomness: one ``torch.multinomial`` a token from ``generator``, none at temperature 0. The stack's counters
        stay as they are.
        """
        choose = Sampler(temperature, top_k, top_p, generator)
        total = self._check_prompt(tokens, max_new_tokens, eos)
        cache = KVCache(total) if use_cache else None
        unread, ended = tokens, torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        with evaluating(self):
            for _ in range(max_new_tokens):
                last = self._stream(unread, cache)[:, -1]
                new = choose(self._logits(last))
                if eos is not None:
                    new = new.masked_fill(ended, eos)
                    ended = ended | (new == eos)
                tokens = torch.cat((tokens, new[:, None]), dim=1)
                unread = tokens if cache is None else new[:, None]
                if eos is not None and ended.all():
                    break
        return tokens

    def _check_prompt(self, tokens: Tensor, max_new_tokens: int, eos: int | None) -> int:
        """How many tokens a sample has in the end."""
        if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int64, torch.int32):
            kind = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
            raise TypeError(f"tokens are of type {kind}, expected a tensor of int64 [B, S]")
        if tokens.dim() != 2 or not tokens.shape[1]:
            raise ValueError(f"tokens have shape {list(tokens.shape)}, expected [B, S] with S >= 1")
        total = tokens.shape[1] + check_count(max_new_tokens, "max_new_tokens", 0)
        if self.max_len is not None and total > self.max_len:
            raise ValueError(
                f"{tokens.shape[1]} tokens and max_new_tokens {max_new_tokens} are {total}, expected at most max_len, "
                f"{self.max_len}"
            )
        if eos is not None and not 0 <= check_integer(eos, "eos") < self.vocab_size:
            raise ValueError(f"eos is {eos}, expected a token from 0 to {self.vocab_size - 1}")
        return total

    def extra_repr(self) -> str:
        return f"max_len={self.max_len}, dropout={self.dropout}"
