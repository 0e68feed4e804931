"""``TransformerLM``: a decoder-only Transformer language model whose layers drop."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from layerdrop_fast._checks import check_count, check_rate
from layerdrop_fast.nn import LayerDropStack
from layerdrop_fast.schedule import DropSchedule


class DecoderLayer(nn.Module):
    """A pre-norm decoder layer, ``x + attention(norm(x))``, then ``x + ffn(norm(x))``, with causal self-attention.

    Shapes:
        x: [B, S, D] -> [B, S, D]
    """

    def __init__(self, d_model: int, nhead: int, dim_feedforward: int, dropout: float) -> None:
        super().__init__()
        self.nhead = nhead
        self.norm1 = nn.LayerNorm(d_model)
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out_proj = nn.Linear(d_model, d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._drop(self._attention(self.norm1(x)))
        return x + self._drop(self.linear2(self._drop(F.gelu(self.linear1(self.norm2(x))))))

    def _attention(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.nhead, width // self.nhead).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0)
        return self.out_proj(y.transpose(1, 2).reshape(batch, length, width))  # type: ignore[no-any-return]

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class TransformerLM(nn.Module):
    """A decoder-only Transformer language model with LayerDrop: the logits of each next token.

    Token and learned position embeddings, ``num_layers`` pre-norm layers in a LayerDropStack (``self.stack``), a final
    LayerNorm, a linear head. ``prune.extract(model, prune.every_other(num_layers, kept=r))`` cuts it to r layers.

    Shapes:
        tokens: int64 [B, S], S <= max_len -> logits [B, S, vocab_size]

    Args:
        vocab_size: number of tokens; 256 for bytes.
        d_model: width D of the residual stream, a multiple of ``nhead``.
        nhead: attention heads.
        num_layers: layers.
        dim_feedforward: hidden width of the feed-forward branch.
        max_len: the longest sequence.
        dropout: rate of ordinary dropout on embeddings, attention weights and branches, in [0, 1].
        schedule, scale, sampling, seed, accumulation: LayerDropStack's. ``schedule=0.0`` is the dense model.

    Raises:
        ValueError: a number out of range; at the call, a sequence longer than ``max_len``.
        TypeError: a number of another kind.

    Randomness: weights and ordinary dropout come from torch's generator, the layers' decisions from the stack's
    counters alone.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        nhead: int,
        num_layers: int,
        dim_feedforward: int,
        *,
        max_len: int,
        dropout: float = 0.1,
        schedule: float | Sequence[float] | DropSchedule = 0.2,
        scale: str = "none",
        sampling: str = "bernoulli",
        seed: int | None = None,
        accumulation: int = 1,
    ) -> None:
        super().__init__()
        sizes = {"vocab_size": vocab_size, "d_model": d_model, "nhead": nhead, "num_layers": num_layers}
        for name, size in (sizes | {"dim_feedforward": dim_feedforward, "max_len": max_len}).items():
            check_count(size, name, 1)
        if d_model % nhead:
            raise ValueError(f"d_model is {d_model}, expected a multiple of nhead, {nhead}")
        self.max_len = max_len
        self.dropout = check_rate(dropout, "dropout")
        self.token_embedding = nn.Embedding(vocab_size, d_model)
        self.position_embedding = nn.Embedding(max_len, d_model)
        self.stack = LayerDropStack(
            [DecoderLayer(d_model, nhead, dim_feedforward, self.dropout) for _ in range(num_layers)],
            schedule,
            scale=scale,
            sampling=sampling,
            seed=seed,
            accumulation=accumulation,
        )
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, vocab_size, bias=False)
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

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[-1]
        if tokens.dim() != 2 or length > self.max_len:
            raise ValueError(f"tokens have shape {list(tokens.shape)}, expected [B, S] with S <= {self.max_len}")
        x = self.token_embedding(tokens) + self.position_embedding.weight[:length]
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        return self.head(self.norm(self.stack(x)))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"max_len={self.max_len}, dropout={self.dropout}"
