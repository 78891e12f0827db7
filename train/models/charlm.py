"""Character language models: an embedding, an LSTM or HyperLSTM, and a linear layer to the characters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperfast.nn import LSTM, HyperLSTM

State = tuple[Tensor, ...]  # [layers, B, units]: h and c, of a HyperLSTM hyper_h and hyper_c too


@dataclass(frozen=True)
class Kind:
    hyper: bool
    layer_norm: bool


MODELS = {
    "lstm": Kind(False, False),
    "ln_lstm": Kind(False, True),
    "hyper_lstm": Kind(True, False),
    "ln_hyper_lstm": Kind(True, True),
}


class CharLM(nn.Module):
    """Tokens int64 [B, T] and a state, None at a text's start -> logits of the next characters [B, T, V] and
    the state after them.

    kind: a name in MODELS. vocabulary: V characters. embedding_size: of the input; 0 for one-hot vectors.
    hyper_size, hyper_embedding_size: M and N_z of a HyperLSTM, without meaning for an LSTM. dropout: of what
    goes into the first layer and comes out of each. recurrent_dropout: of the candidates in the cells. fused:
    kernels for the whole sequence, otherwise plain PyTorch step by step. Raises ValueError for an unknown
    kind and sizes out of range.
    """

    def __init__(
        self,
        kind: str,
        vocabulary: int,
        embedding_size: int = 128,
        hidden_size: int = 512,
        num_layers: int = 1,
        hyper_size: int = 128,
        hyper_embedding_size: int = 16,
        dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        fused: bool = True,
    ):
        super().__init__()
        if kind not in MODELS:
            raise ValueError(f"unknown model {kind!r}; choose one of {', '.join(MODELS)}")
        if vocabulary < 1 or embedding_size < 0:
            raise ValueError(
                f"vocabulary must be at least 1 and embedding_size at least 0, got {vocabulary} and "
                f"{embedding_size}"
            )
        self.kind, self.dropout = kind, dropout
        model, inputs = MODELS[kind], embedding_size or vocabulary
        options = {
            "num_layers": num_layers,
            "layer_norm": model.layer_norm,
            "recurrent_dropout": recurrent_dropout,
            "dropout": dropout if num_layers > 1 else 0.0,
            "backend": "auto" if fused else "reference",
        }
        self.embedding = nn.Embedding(vocabulary, embedding_size) if embedding_size else None
        if model.hyper:
            options |= {"hyper_size": hyper_size, "embedding_size": hyper_embedding_size}
            self.lstm: nn.Module = HyperLSTM(inputs, hidden_size, **options)
        else:
            self.lstm = LSTM(inputs, hidden_size, **options)
        self.output = nn.Linear(hidden_size, vocabulary)
        nn.init.orthogonal_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        self.register_buffer("one_hot", torch.eye(0 if embedding_size else vocabulary), persistent=False)

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        weight = self.one_hot if self.embedding is None else self.embedding.weight
        x = F.dropout(F.embedding(tokens.t(), weight), self.dropout, self.training)
        x, last = self.lstm(x, state)
        x = F.dropout(x, self.dropout, self.training)
        return self.output(x).transpose(0, 1), tuple(last)
