#!/usr/bin/env python
"""Evaluate one checkpoint on the test split and write `metrics.json`."""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)

from src.runner.eval_runner import EvalRunner  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="dataset name")
    parser.add_argument("--models", required=True, help="architecture of the checkpoint")
    parser.add_argument("--checkpoint", required=True, type=Path)
    parser.add_argument("--output", default=Path("results"), type=Path, help="folder of metrics.json")
    parser.add_argument("--config", default=None, type=Path, help="config to take the data from; default: the one saved beside the checkpoint")
    args = parser.parse_args()
    runner = EvalRunner(args.data, args.output, config_path=args.config)
    result = runner.evaluate_model(args.models, args.checkpoint)
    for name, value in result.items():
        print(f"{name}: {value:.4f}")


if __name__ == "__main__":
    main()
