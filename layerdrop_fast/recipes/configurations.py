"""Named trainings of language models: small ones for one machine, and the paper's on WikiText-103."""

from __future__ import annotations

from dataclasses import dataclass, replace

from layerdrop_fast.recipes.training import DENSE, ModelSize, Training

# Fan, Grave, Joulin 2019, appendix A.1, and Baevski & Auli 2019, whose hyper-parameters it follows: bands of 20,000,
# 40,000 and 200,000 words, Nesterov's accelerated gradient with momentum 0.99, a learning rate that rises to 1 over
# 16,000 steps and falls by a cosine over 270,000, and gradients clipped at 0.1. A step there has 8 x 3 x 3,072 tokens.
_WIKITEXT_103 = Training(
    ModelSize(
        num_layers=16,
        d_model=1024,
        nhead=8,
        dim_feedforward=4096,
        context=3072,
        cutoffs=(20_000, 60_000),
        positions="sinusoidal",
        final_norm=False,
        dropout=0.3,
        attention_dropout=0.1,
        activation_dropout=0.1,
        activation="relu",
    ),
    DENSE,
    steps=286_000,
    batch=1,
    accumulation=24,
    optimizer="nag",
    learning_rate=1.0,
    last_learning_rate=1e-4,
    warmup=16 / 286,
    weight_decay=0.0,
    momentum=0.99,
    clip=0.1,
    dtype="bfloat16",
)


@dataclass(frozen=True)
class Configuration:
    """A training without its text and what it drops."""

    about: str
    training: Training
    words: bool = False  # or bytes
    for_gpus: bool = False

    def of(self, vocab_size: int) -> Training:
        """For a vocabulary of so many tokens; bands that it does not reach are left out."""
        cutoffs = self.training.size.cutoffs
        if cutoffs is not None:
            cutoffs = tuple(cutoff for cutoff in cutoffs if cutoff < vocab_size) or None
        return replace(self.training, size=replace(self.training.size, vocab_size=vocab_size, cutoffs=cutoffs))


CONFIGURATIONS = {
    "bytes-16": Configuration("16 layers, d 64, byte by byte: the demo's", Training(ModelSize(), DENSE, 1200)),
    "bytes-40": Configuration("40 layers, d 64, byte by byte", Training(ModelSize(num_layers=40), DENSE, 760)),
    "words-16": Configuration(
        "16 layers, d 64, word by word, adaptive softmax",
        Training(ModelSize(cutoffs=(2_000, 10_000), context=48), DENSE, 1200),
        words=True,
    ),
    "wikitext-103-16": Configuration(
        "the paper's 16 layers, 247 million parameters, for GPUs", _WIKITEXT_103, words=True, for_gpus=True
    ),
    "wikitext-103-40": Configuration(
        "40 layers, 423 million parameters as the paper's has (its FFN width is not told, 2560 fits), for GPUs",
        replace(_WIKITEXT_103, size=replace(_WIKITEXT_103.size, num_layers=40, dim_feedforward=2560)),
        words=True,
        for_gpus=True,
    ),
}
