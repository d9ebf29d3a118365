"""Long texts in pieces, and pieces in batches, so that encoding them takes bounded memory."""

from collections.abc import Iterator
from dataclasses import dataclass

PIECE_CHARS = 1 << 18
# Encodings take about 120 bytes a token until their ids are copied out.
BATCH_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a text: the text's number, the part's number in it."""

    number: int
    place: int
    text: str


def cut(text: str, anywhere: bool = True) -> list[str]:
    """Split a long text before a space between two letters, at most PIECE_CHARS apart.

    Without such a place it is cut at that length; or, unless `anywhere`, at the next such place.
    """
    pieces, start = [], 0
    while len(text) - start > PIECE_CHARS:
        end, lowest = start + PIECE_CHARS, start + PIECE_CHARS // 2
        place = text.rfind(" ", lowest, end)
        while place > lowest and not _between_letters(text, place):
            place = text.rfind(" ", lowest, place)
        if place <= lowest:
            place = end if anywhere else _next_place(text, end)
        pieces.append(text[start:place])
        start = place
    pieces.append(text[start:] if start else text)
    return pieces


def _between_letters(text: str, place: int) -> bool:
    return text[place - 1].isalpha() and text[place + 1 : place + 2].isalpha()


def _next_place(text: str, place: int) -> int:
    place = text.find(" ", place)
    while place >= 0 and not _between_letters(text, place):
        place = text.find(" ", place + 1)
    return place if place >= 0 else len(text)


def batches(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Runs of pieces of at most BATCH_BYTES together, three bytes for a non-ASCII character."""
    batch: list[Piece] = []
    num_bytes = 0
    for piece in pieces:
        piece_bytes = len(piece.text) if piece.text.isascii() else 3 * len(piece.text)
        if batch and num_bytes + piece_bytes > BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
        batch.append(piece)
        num_bytes += piece_bytes
    if batch:
        yield batch
