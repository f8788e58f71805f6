"""Facts about predicates which hold for all tensors and sizes: proofs, so False means "not proved"."""

from __future__ import annotations

from typing import Any

from regraft.ir.mask.length import KEY_LENGTH, QUERY_LENGTH, Length, symbol
from regraft.ir.mask.predicate import And, Band, Chunk, Everything, Or, Predicate, Prefix, Same
from regraft.ir.mask.simplify import simplify
from regraft.ir.nodes import size_equal


def proof_lengths(query_length: Any, key_length: Any) -> tuple[Length | int | None, Length | int | None]:
    """Lengths as proofs take them: ints, one symbol for both where they are equal, None for two unrelated symbols."""
    if isinstance(query_length, int) and isinstance(key_length, int):
        return query_length, key_length
    if size_equal(query_length, key_length):
        return symbol(QUERY_LENGTH), symbol(QUERY_LENGTH)
    return None, None


def is_causal(predicate: Predicate, offset: Length | int | str = 0) -> bool:
    """Whether the predicate is exactly ``key <= query + offset``.

    ``offset`` 0 is the meaning of SDPA's ``is_causal``; ``"key_len - query_len"`` aligns at the last key
    instead.
    """
    return simplify(predicate) == Band(None, Length.of(offset))


def every_row_nonempty(
    predicate: Predicate, query_length: Length | int | None = None, key_length: Length | int | None = None
) -> bool:
    """Proof that each query sees at least one key, whatever the tensors hold.

    Lengths default to the symbols ``query_len`` and ``key_len``; self-attention is the same length given
    twice.
    """
    rows = symbol(QUERY_LENGTH) if query_length is None else Length.of(query_length)
    columns = symbol(KEY_LENGTH) if key_length is None else Length.of(key_length)
    if not columns.at_least(1):
        return False
    plain = simplify(predicate, rows, columns)
    return (
        _first_key(plain, rows)
        or (columns.at_least(rows) and _diagonal(plain, rows))
        or _interval(plain, rows, columns)
        or (isinstance(plain, Or) and any(every_row_nonempty(part, rows, columns) for part in plain.operands))
    )


def _first_key(predicate: Predicate, rows: Length) -> bool:
    """Every query sees key 0."""
    match predicate:
        case Everything():
            return True
        case Band(lower, upper):
            above = upper is None or upper.at_least(0)
            return above and (lower is None or (-rows + 1).at_least(lower))
        case Prefix(length):
            return length.at_least(1)
        case And(operands):
            return all(_first_key(operand, rows) for operand in operands)
        case Or(operands):
            return any(_first_key(operand, rows) for operand in operands)
    return False


def _diagonal(predicate: Predicate, rows: Length) -> bool:
    """Every query sees the key of its own index."""
    match predicate:
        case Everything():
            return True
        case Band(lower, upper):
            return (lower is None or Length().at_least(lower)) and (upper is None or upper.at_least(0))
        case Prefix(length):
            return length.at_least(rows)
        case Chunk(offset=offset):
            return offset == Length()
        case Same(left, right):
            return left == right  # integers, so each equals itself
        case And(operands):
            return all(_diagonal(operand, rows) for operand in operands)
        case Or(operands):
            return any(_diagonal(operand, rows) for operand in operands)
    return False


def _interval(predicate: Predicate, rows: Length, columns: Length) -> bool:
    """One band and prefixes: the band begins before the end of the keys in the last row, and reaches key 0 or
    more."""
    ends = [columns]
    found: Band | None = None
    for part in predicate.operands if isinstance(predicate, And) else (predicate,):
        if isinstance(part, Band) and found is None:
            found = part
        elif isinstance(part, Prefix):
            ends.append(part.length)
        else:
            return False
    if found is None or not all(end.at_least(1) for end in ends):
        return False
    lower, upper = found.lower, found.upper
    if lower is not None and upper is not None and not upper.at_least(lower):
        return False
    reaches = lower is None or all((end - rows).at_least(lower) for end in ends)
    return reaches and (upper is None or upper.at_least(0))
