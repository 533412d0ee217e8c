"""The table that the benchmarks of counted GPU traffic print: a line for each launch, in MB, millions of mma and µs."""

from collections.abc import Mapping
from typing import Protocol


class Launch(Protocol):
    distinct: float  # bytes
    floor: float
    read_again: float
    mma: float
    least: float

    @property
    def microseconds(self) -> float: ...


def print_launches(launches: Mapping[str, Launch]) -> None:
    heads = f"{'distinct':>9} {'floor':>8} {'ratio':>6} {'read again':>11} {'mma':>8} {'least':>8} ratio     µs"
    print(f"{'launch':<20} {heads}")
    for name, one in launches.items():
        ratio = f"{one.mma / one.least:5.2f}" if one.least else " " * 5
        print(
            f"{name:<20} {one.distinct / 1e6:9.1f} {one.floor / 1e6:8.1f} {one.distinct / one.floor:6.2f} "
            f"{one.read_again / 1e6:11.1f} {one.mma / 1e6:8.2f} {one.least / 1e6:8.2f} {ratio} {one.microseconds:6.1f}"
        )
