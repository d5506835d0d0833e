"""The contact sheet: a picture to check by eye that the two images of each pair match."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from mics_fast.common.files import make_private, renamed
from mics_fast.data.images import decode

_SAMPLES, _COLUMNS = 24, 3
_CELL, _CAPTION, _MARGIN = 176, 34, 12  # pixels
_INK, _PAPER, _MISSING = "black", "white", "lightgrey"


def write_contact_sheet(
    path: Path, records: Sequence[Mapping[str, str]], modalities: Sequence[str]
) -> None:
    """Draw samples of every class, with the modalities of a sample side by side.

    Each class begins on a new line.

    Args:
        path: of the PNG; paths in the records are relative to its folder.
        records: rows of the manifest.
        modalities: names of the columns that hold paths.
    """
    chosen = choose(records)
    block_width = len(modalities) * _CELL + _MARGIN
    block_height = _CELL + _CAPTION + _MARGIN
    lines = sum(-(-len(own) // _COLUMNS) for own in chosen)
    sheet = Image.new(
        "RGB", (_COLUMNS * block_width + _MARGIN, lines * block_height + _MARGIN), _PAPER
    )
    draw = ImageDraw.Draw(sheet)
    first = 0
    for own in chosen:
        for number, record in enumerate(own):
            line, column = divmod(number, _COLUMNS)
            corner = (_MARGIN + column * block_width, _MARGIN + (first + line) * block_height)
            draw_sample(sheet, draw, corner, record, modalities, path.parent)
        first += -(-len(own) // _COLUMNS)
    with renamed(path) as partial:
        sheet.save(partial, "PNG")
        make_private(partial)


def choose(records: Sequence[Mapping[str, str]]) -> list[list[Mapping[str, str]]]:
    """Choose for each class an equal number of samples, at most 24 in all, evenly spaced over its
    rows, in full lines where there are several; of more than 24 classes the first 24."""
    by_class = defaultdict(list)
    for record in records:
        by_class[record["label"]].append(record)
    share = max(1, _SAMPLES // len(by_class))
    if share > _COLUMNS:
        share -= share % _COLUMNS
    chosen = []
    for label in sorted(by_class)[:_SAMPLES]:
        own = by_class[label]
        count = min(share, len(own))
        chosen.append([own[k * len(own) // count] for k in range(count)])
    return chosen


def draw_sample(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    record: Mapping[str, str],
    modalities: Sequence[str],
    folder: Path,
) -> None:
    """Draw the uncropped images of one sample with a caption below: label, split and id."""
    left, top = corner
    virtual = record["virtual"].split()
    for column, name in enumerate(modalities):
        place = (left + column * _CELL, top)
        if record[name]:
            image = Image.fromarray(decode(folder / record[name]))
            sheet.paste(ImageOps.pad(image, (_CELL - 2, _CELL - 2), color=_INK), place)
        else:
            draw.rectangle((*place, place[0] + _CELL - 3, top + _CELL - 3), fill=_MISSING)
        shown = f"virtual {name.upper()}" if name in virtual else name.upper()
        tag = shown if record[name] else f"no {shown}"
        draw.text((place[0] + 4, top + 3), tag, fill="yellow", font=font(), stroke_width=2,
                  stroke_fill=_INK)  # fmt: skip
    keeps = ", labelled" if record["labelled"] == "1" else ""
    what = f"{record['label'] or 'no label'}  ({record['split']}{keeps})"
    width = len(modalities) * _CELL
    for line, text in enumerate((what, record["id"])):
        draw.text((left, top + _CELL + 1 + 15 * line), fitted(draw, text, width), fill=_INK,
                  font=font())  # fmt: skip


def fitted(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    """Shorten a text from its beginning until it is at most ``width`` pixels wide."""
    if draw.textlength(text, font=font()) <= width:
        return text
    while text and draw.textlength(f"...{text}", font=font()) > width:
        text = text[1:]
    return f"...{text}"


def font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Return Pillow's built-in font."""
    return ImageFont.load_default(13)
