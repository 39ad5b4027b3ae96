#!/usr/bin/env python
"""Train a model from a YAML config: `python scripts/train.py --config configs/flow.yaml`."""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)

import yaml  # noqa: E402

from src.runner.train_runner import TrainRunner  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, type=Path, help="YAML file with the blocks model, data and trainer")
    parser.add_argument("--debug", action="store_true", help="leave out weight averaging")
    args = parser.parse_args()
    config = yaml.safe_load(args.config.read_text(encoding="utf-8"))
    if args.debug:
        config["debug"] = True
    TrainRunner(config).run()


if __name__ == "__main__":
    main()
