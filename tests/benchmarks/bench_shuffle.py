"""What drawing a donor costs, by the number of images among which it is drawn.

    python tests/benchmarks/bench_shuffle.py          # 10^3 to 10^5
    python tests/benchmarks/bench_shuffle.py --full   # and 10^6

Prints, for each number: the first draw of a process, which orders the names once; the median and quartiles of a later one; and the time
that a batch of 8 takes to be exchanged.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

from vlmfilm_plugin.features.shuffle import Shuffle, Split

ROUNDS, DRAWS = 21, 2000


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def draw(shuffle: Shuffle, split: Split, members: list[str], steps: range) -> None:
    for step in steps:
        next(shuffle.donors(members[step * 7919 % len(members)], step, split))


def measure(count: int) -> str:
    names = [f"test/image/{index:07d}.png" for index in range(count)]
    random.Random(0).shuffle(names)
    shuffle = Shuffle()

    def first() -> Split:
        split = Split(sorted(names))
        next(shuffle.donors(names[0], 0, split))
        return split

    start = time.perf_counter()
    split = first()
    opened = time.perf_counter() - start
    rounds = [seconds(lambda r=r: draw(shuffle, split, names, range(r * DRAWS, (r + 1) * DRAWS))) for r in range(ROUNDS)]  # type: ignore[misc]
    low, middle, high = (1e6 * value / DRAWS for value in statistics.quantiles(rounds, n=4))
    return f"{count:>9,}  first {1e3 * opened:>8.1f} ms   later {middle:>5.2f} us (quartiles {low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="up to 10^6 images")
    options = parser.parse_args()
    for exponent in range(3, 7 if options.full else 6):
        print(measure(10**exponent), flush=True)
    shuffle, batch = Shuffle(), [f"{index}.png" for index in range(8)]
    times = [seconds(lambda step=step: shuffle.exchange(batch, step)) for step in range(2000)]  # type: ignore[misc]
    print(f"a batch of 8: {1e6 * statistics.median(times):.1f} us")


if __name__ == "__main__":
    main()
