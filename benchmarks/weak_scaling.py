"""Weak scaling: a step of one process beside one of two, each with as many samples as the one.

    python benchmarks/weak_scaling.py [--rounds 5] [--quick] [--save FILE]

As `loop.py` measures, with layers 1024 wide and 256 samples in each process. On a machine of two cores, two processes
also share its memory, and raw PyTorch shows what that takes.
"""

from __future__ import annotations

from loop import timed
from turns import Table, options_of

WIDTH, SAMPLES = 1024, 256


def main() -> None:
    """Measure and print the table."""
    a = options_of(__doc__).parse_args()
    table = Table("Weak scaling", "µs a step")
    table.measure(
        {
            f"{peer}, {count}": timed(
                peer, count, 200, BENCHMARK_WIDTH=str(WIDTH), BENCHMARK_BATCH=str(SAMPLES * count)
            )
            for peer in ("raw", "distrain")
            for count in (1, 2)
        },
        base="raw, 1",
        rounds=1 if a.quick else a.rounds,
        title=f"{SAMPLES} samples in each of 1 and 2 processes, layers {WIDTH} wide",
    )
    table.save(a.save)


if __name__ == "__main__":
    main()
