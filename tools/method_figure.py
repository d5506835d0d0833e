"""Draw docs/images/method.svg, both stages of the method, with a pair of the phantom as input.

Run from the root of the repository: python -m tools.method_figure
"""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from mics_fast.preparation.phantom import SIDE, render_pair

FILE = Path(__file__).parents[1] / "docs" / "images" / "method.svg"
SEED, PAIR = 0, 4  # a bump, visible in both modalities
WIDTH, HEIGHT = 860, 716
PATCHES, HIDDEN = 8, 0.75  # per side; share masked in pre-training

STYLE = """
text { font-family: system-ui, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif; fill: #1b2a33; }
.title { font-size: 20px; font-weight: 600; }
.name { font-size: 16px; font-weight: 600; }
.note { font-size: 14px; fill: #43545e; }
.code { font-size: 13px; font-family: ui-monospace, 'DejaVu Sans Mono', monospace; fill: #0b5f6f; }
.panel { fill: #ffffff; stroke: #c9d3d8; }
.network { fill: #e6eef5; stroke: #5b7c99; }
.loss { fill: #fff3df; stroke: #b98329; }
.opinion { fill: #e3f2ea; stroke: #4d8b69; }
.arrow { stroke: #43545e; stroke-width: 1.6; fill: none; marker-end: url(#head); }
"""


def main() -> None:
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text(figure(), encoding="utf-8")
    print(f"wrote {FILE}")


def figure() -> str:
    """Return the whole picture as SVG."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
        "<title>The two stages of MICS: pre-training without labels, fine-tuning with few</title>"
        f"<style>{STYLE}</style>"
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="#43545e"/></marker></defs>'
    )
    return "\n".join([head, *pretraining(), *finetuning(348), "</svg>\n"])


def pretraining() -> list[str]:
    """Draw the first stage: two frames, encoder and teacher, three losses."""
    _, wli, nbi = render_pair(SEED, PAIR)
    return [
        panel(8, 322),
        text(28, 38, "1 · Pre-training: pairs without labels", "title"),
        picture(28, 60, wli, "WLI"),
        picture(28, 196, nbi, "NBI"),
        picture(148, 60, hide_patches(wli, 0), "75 % hidden"),
        picture(148, 196, hide_patches(nbi, 1), ""),
        box(292, 74, 148, 70, "network", "Teacher", "momentum copy"),
        box(292, 214, 148, 70, "network", "Encoder", "all modalities"),
        arrow(252, 120, 288, 112),
        arrow(252, 248, 288, 248),
        box(
            508,
            60,
            336,
            74,
            "loss",
            "Consistency",
            "find the pair's other feature in a queue",
            "multimodal_consistency_loss",
        ),
        box(508, 152, 336, 54, "loss", "Reconstruction", "predict the hidden patches"),
        box(
            508,
            224,
            336,
            74,
            "loss",
            "Alignment",
            "a discriminator must not tell",
            "reconstructed from true patches",
        ),
        arrow(440, 104, 504, 98),
        arrow(440, 232, 504, 116),
        arrow(440, 248, 504, 180),
        arrow(440, 262, 504, 262),
    ]


def finetuning(top: int) -> list[str]:
    """Draw the second stage: opinions of modalities, fusion encoder and fusion."""
    _, wli, nbi = render_pair(SEED, PAIR)
    return [
        panel(top, HEIGHT - top - 8),
        text(28, top + 30, "2 · Fine-tuning: few labels, many unlabelled pairs", "title"),
        picture(28, top + 52, wli, "WLI"),
        picture(28, top + 204, nbi, "NBI"),
        box(170, top + 66, 120, 62, "network", "Encoder", "WLI"),
        box(170, top + 218, 120, 62, "network", "Encoder", "NBI"),
        box(
            312,
            top + 136,
            150,
            74,
            "network",
            "Fusion encoder",
            "distribution shift",
            "shift_features",
        ),
        arrow(126, top + 98, 166, top + 98),
        arrow(126, top + 250, 166, top + 250),
        arrow(252, top + 130, 308, top + 158),
        arrow(252, top + 216, 308, top + 190),
        box(500, top + 66, 108, 62, "opinion", "Opinion", "of WLI"),
        box(500, top + 142, 108, 62, "opinion", "Opinion", "of both"),
        box(500, top + 218, 108, 62, "opinion", "Opinion", "of NBI"),
        arrow(292, top + 98, 496, top + 98),
        arrow(464, top + 173, 496, top + 173),
        arrow(292, top + 250, 496, top + 250),
        box(
            664,
            top + 118,
            180,
            110,
            "opinion",
            "Fused opinion",
            "by Dempster's rule:",
            "class and uncertainty",
            "fuse_evidence",
        ),
        arrow(610, top + 98, 660, top + 140),
        arrow(610, top + 173, 660, top + 173),
        arrow(610, top + 250, 660, top + 206),
        box(170, top + 300, 330, 46, "loss", "Labels", "evidential_fusion_loss"),
        box(520, top + 300, 324, 46, "loss", "Pseudo-labels", "where uncertainty is low"),
        arrow(754, top + 230, 754, top + 296),
    ]


def panel(top: int, height: int) -> str:
    return f'<rect class="panel" x="4" y="{top}" width="{WIDTH - 8}" height="{height}" rx="10"/>'


def text(x: int, y: int, words: str, style: str, anchor: str = "start") -> str:
    return f'<text class="{style}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(words)}</text>'


def box(x: int, y: int, width: int, height: int, style: str, name: str, *notes: str) -> str:
    """Draw a labelled box; a note with an underscore is the name of an operator."""
    lines = [(name, "name")]
    lines += [(note, "code" if "_" in note else "note") for note in notes]
    first = y + height / 2 - 9.5 * (len(lines) - 1) + 5
    middle = x + width // 2
    words = [
        text(middle, round(first + 19 * row), line, kind, "middle")
        for row, (line, kind) in enumerate(lines)
    ]
    shape = f'<rect class="{style}" x="{x}" y="{y}" width="{width}" height="{height}" rx="7"/>'
    return shape + "".join(words)


def arrow(x0: int, y0: int, x1: int, y1: int) -> str:
    return f'<path class="arrow" d="M{x0} {y0}L{x1} {y1}"/>'


def picture(x: int, y: int, frame: np.ndarray, caption: str) -> str:
    """Draw a frame of the phantom as an embedded JPEG, 96 units wide, with a caption below."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    image = (
        f'<image x="{x}" y="{y}" width="96" height="96" href="data:image/jpeg;base64,{data}">'
        f"<title>{escape(caption or 'a frame with hidden patches')}</title></image>"
    )
    return image + text(x + 48, y + 114, caption, "note", "middle")


def hide_patches(frame: np.ndarray, seed: int) -> np.ndarray:
    """Paint the share ``HIDDEN`` of a frame's patches grey."""
    side = SIDE // PATCHES
    shown = frame.copy()
    order = np.random.default_rng(seed).permutation(PATCHES**2)
    for patch in order[: round(HIDDEN * PATCHES**2)]:
        row, column = divmod(int(patch), PATCHES)
        shown[row * side : (row + 1) * side, column * side : (column + 1) * side] = 205
    return shown


if __name__ == "__main__":
    main()
