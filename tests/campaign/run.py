"""The fault campaign: `python tests/campaign/run.py [--short] [--only KIND ...] [--seed N]`.

Kills at random moments, flipped bits, crafted stores and checkpoints, images, YAML and names. Prints attempts and failures of each kind; the
exit code is 1 where there was any failure. Every attempt is told by its kind, number and seed: the same three give the same attempt.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
for name in [name for name in os.environ if name.startswith("VLM_F")]:
    del os.environ[name]
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import torch  # noqa: E402
from flips import CheckpointFlips, FeatureFileFlips, StoreFlips, WeightFlips  # noqa: E402
from hostile_checkpoints import Payloads, StrangeCheckpoints, StrangeWeights  # noqa: E402
from hostile_images import HostileImages, HostileSets  # noqa: E402
from hostile_names import HostileNames  # noqa: E402
from hostile_stores import HostileStores  # noqa: E402
from hostile_yaml import HostileYaml  # noqa: E402
from kills import ApplyKills, CacheKills, ExportKills, TrainingKills, WarmupKills  # noqa: E402
from referee import Kind, judge  # noqa: E402

KINDS: tuple[type[Kind], ...] = (
    WarmupKills,
    TrainingKills,
    ExportKills,
    ApplyKills,
    CacheKills,
    StoreFlips,
    CheckpointFlips,
    WeightFlips,
    FeatureFileFlips,
    HostileStores,
    Payloads,
    StrangeCheckpoints,
    StrangeWeights,
    HostileImages,
    HostileSets,
    HostileYaml,
    HostileNames,
)


def main() -> int:
    """Run the campaign and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a few attempts of each kind")
    parser.add_argument("--only", nargs="+", metavar="KIND", choices=[kind.name for kind in KINDS], help="these kinds alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, help="so many attempts of each kind")
    given = parser.parse_args()
    torch.set_num_threads(1)
    start, tallies = time.monotonic(), []
    print(f"{'kind':<22} {'attempts':>8} {'failures':>8} {'time':>8}  how they ended", flush=True)
    for made in KINDS:
        if given.only and made.name not in given.only:
            continue
        kind = made()
        kind.is_short = given.short
        tally = judge(kind, given.count or (kind.short if given.short else kind.full), given.seed)
        tallies.append(tally)
        print(tally.row(), flush=True)
        for number, failure in tally.failures[:10]:
            print(f"    FAILURE {kind.name} {number}: {failure}", flush=True)
        if len(tally.failures) > 10:
            print(f"    ... and {len(tally.failures) - 10} more", flush=True)
    attempts, failures = sum(tally.attempts for tally in tallies), sum(len(tally.failures) for tally in tallies)
    print(f"{'all':<22} {attempts:>8} {failures:>8} {time.monotonic() - start:>7.0f}s  seed {given.seed}")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
