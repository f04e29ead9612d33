import pytest

from llama_ray.data.report.numbers import share, short, size


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (3.14159, "3.14"),
        (999.6, "1.00 k"),
        (1000, "1.00 k"),
        (12_345, "12.3 k"),
        (999_499, "999 k"),
        (999_999, "1.00 M"),
        (1.5e12, "1.50 T"),
    ],
)
def test_short(number, shown):
    assert short(number) == shown


def test_sizes():
    assert [size(number) for number in (0, 999, 1000, 5_300_000_000)] == [
        "0 bytes",
        "999 bytes",
        "1.00 kB",
        "5.30 GB",
    ]


@pytest.mark.parametrize(
    ("part", "whole", "shown"),
    [
        (0, 9, "0 %"),
        (1, 0, "0 %"),
        (1, 10**6, "< 0.1 %"),
        (1, 3, "33 %"),
        (1, 30, "3.3 %"),
        (999_999, 10**6, "99.9 %"),
        (5, 5, "100 %"),
    ],
)
def test_shares(part, whole, shown):
    assert share(part, whole) == shown
