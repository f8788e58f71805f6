"""The texts behind ``help()``, on every machine with Python: passages of one topic, paragraphs of their own lengths."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pydoc_data.topics import topics

_SHORTEST = 40  # characters of a paragraph
_MARKUP = re.compile(r"[*`\"|]+|\s+")


def paragraphs() -> list[str]:
    """Paragraphs of running text, in an order that is always the same; tables, grammars and code are left out."""
    return [text for name in sorted(topics) for text in _paragraphs(topics[name])]


def _paragraphs(topic: str) -> Iterator[str]:
    for block in topic.split("\n\n"):
        text = _MARKUP.sub(" ", block).strip()
        words = text.split()
        prose = sum(word.strip(".,;:()").isalpha() for word in words)
        if len(text) >= _SHORTEST and text[-1] in ".:" and not block.startswith("   ") and prose > 0.8 * len(words):
            yield text


def passages(words: int) -> list[str]:
    """Texts of at least ``words`` words, each of one topic's neighbouring paragraphs."""
    found = []
    for name in sorted(topics):
        held: list[str] = []
        for text in _paragraphs(topics[name]):
            held += text.split()
            if len(held) >= words:
                found.append(" ".join(held))
                held = []
    random.Random(0).shuffle(found)
    return found


def batch_of_paragraphs(count: int, seed: int) -> list[str]:
    """Paragraphs drawn at random: their lengths are as spread as those of real requests."""
    return random.Random(seed).sample(paragraphs(), count)
