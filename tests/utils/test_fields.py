from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest

from llama_ray.utils.fields import check_fields, limits, shown


@dataclass
class Settings:
    count: int = field(default=1, metadata=limits(1))
    share: float | None = field(default=None, metadata=limits(above=0, most=1))
    mode: Literal["fast", "exact", "both"] = "fast"
    name: str = ""


@dataclass
class Forgotten:
    count: int = 1


def test_values_within_their_limits_pass() -> None:
    check_fields(Settings())
    check_fields(Settings(count=2**31 - 1, share=1, mode="both"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(count=0), "at count is 0; it must be at least 1"),
        (Settings(count=2**31), "at count is 2147483648; it must be at most 2147483647"),
        (Settings(share=0), "at share is 0; it must be above 0 and at most 1"),
        (Settings(mode="slow"), "at mode is 'slow'; choose fast, exact or both"),  # type: ignore[arg-type]
    ],
)
def test_a_refusal_is_one_line(settings: Settings, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        check_fields(settings, "at ")


def test_a_number_without_limits_is_a_mistake_of_the_programmer() -> None:
    with pytest.raises(TypeError, match=r"Forgotten\.count declares no limits"):
        check_fields(Forgotten())


@pytest.mark.parametrize(
    ("value", "text"),
    [("x" * 99, f"'{'x' * 39}..."), (10**5000, "a number of about 4983 digits"), (1.5, "1.5")],
    ids=["text", "digits", "number"],
)
def test_long_values_are_cut(value: object, text: str) -> None:
    assert shown(value) == text
