"""Loggers, and the one channel for the lines of a FiLM run: stdout, rank 0, one line each.

Knows nothing of torch; the rank comes from the launcher's environment variables, which every launcher sets before training.
"""

from __future__ import annotations

import logging
import os
import sys

_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
ROOT = "vlmfilm"


def is_rank_zero() -> bool:
    """Tell whether this process is the one that reports; true where nothing is distributed."""
    return next((os.environ[name] for name in _RANK_VARIABLES if name in os.environ), "0") in {"", "0"}


def say(text: str) -> None:
    """Write a line to stderr: of activation, before there is a run whose lines could be logged; every process speaks."""
    sys.stderr.write(f"{ROOT}: {text}\n")
    sys.stderr.flush()


class _StdoutHandler(logging.Handler):
    """Write to whatever sys.stdout is at that moment: notebooks and progress bars replace it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stdout.write(self.format(record) + "\n")
            sys.stdout.flush()
        except Exception:
            self.handleError(record)


def film_logger() -> logging.Logger:
    """Return the logger of the `[FILM-...]` and `[VLM]` lines: stdout, rank 0 only, message text alone."""
    logger = logging.getLogger(f"{ROOT}.film")
    if not any(isinstance(handler, _StdoutHandler) for handler in logger.handlers):
        logger.addHandler(_StdoutHandler())
        logger.addFilter(lambda record: is_rank_zero())
        logger.setLevel(logging.INFO)
        logger.propagate = False
    return logger
