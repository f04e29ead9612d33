"""Numbers as people read them."""

from __future__ import annotations

_UNITS = ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k"))
_BYTES = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


def short(number: float) -> str:
    """Return three digits and a unit, such as 1.23 M; small whole numbers as they are."""
    return _scaled(number, _UNITS, "")


def size(number: int) -> str:
    """Return bytes with a decimal unit, such as 1.23 MB."""
    return _scaled(number, _BYTES, " bytes")


def share(part: float, whole: float) -> str:
    """Return a percentage: 0 and 100 % only where it is all or nothing."""
    if not part or not whole:
        return "0 %"
    percent = 100 * part / whole
    if percent < 0.1:
        return "< 0.1 %"
    return (
        "100 %" if part >= whole else f"{min(percent, 99.9):.{1 if percent < 10 or percent > 99 else 0}f} %"
    )


def _scaled(number: float, units: tuple[tuple[int, str], ...], plain: str) -> str:
    for factor, unit in units:
        # 999.6 would be shown as 1e+03.
        if number >= 0.9995 * factor:
            value = number / factor
            return f"{value:.{max(0, 2 - (value >= 10) - (value >= 100))}f} {unit}"
    return f"{number:.3g}{plain}" if number != int(number) else f"{int(number)}{plain}"
