"""SVG to PNG, where the extra `figures` is installed."""

from __future__ import annotations

from functools import lru_cache

ZOOM = 2  # pixels of the PNG for one of the SVG, so that print and dense screens are sharp
# Tried in this order; each has the letters of the figures or lets another font lend them.
_FAMILIES = ("Helvetica", "Arial", "Segoe UI", "DejaVu Sans", "Liberation Sans", "Noto Sans", "Roboto", "Verdana")
_INSTALL = "PNG figures need resvg: pip install 'ctl-merge[figures]'"
_NO_FONT = f"PNG figures need a font with letters: install one of {', '.join(_FAMILIES)} (Debian: fonts-dejavu-core)"


def png(svg: str) -> bytes | None:
    """The picture at twice its size; None where it cannot be drawn, for which `missing` has the reason."""
    if missing():
        return None
    from resvg_py import svg_to_bytes

    return bytes(svg_to_bytes(svg_string=svg, zoom=ZOOM, sans_serif_family=_family()))


def missing() -> str | None:
    """What to install before figures can be PNG; None where nothing is missing."""
    try:
        import resvg_py  # noqa: F401
    except ImportError:
        return _INSTALL
    return None if _family() else _NO_FONT


@lru_cache
def _family() -> str | None:
    """The first family that is on this machine: resvg leaves text out, without a word, where it finds no font."""
    from resvg_py import svg_to_bytes

    def drawn(text: str, family: str) -> bytes:
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" width="20" height="20">{text}</svg>'
        return bytes(svg_to_bytes(svg_string=svg, sans_serif_family=family))

    text = '<text x="2" y="16" font-size="16" font-family="sans-serif">R</text>'
    stand_in, nothing = drawn(text, "no such family"), drawn("", "no such family")  # serifs, for a family not there
    own = next((f for f in _FAMILIES if drawn(text, f) not in (stand_in, nothing)), None)
    return own or (_FAMILIES[0] if stand_in != nothing else None)
