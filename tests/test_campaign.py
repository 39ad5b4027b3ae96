"""The fault campaign in its short form; the whole one is `python tests/campaign/run.py`."""

from __future__ import annotations

from pathlib import Path

from processes import python, succeed

RUN = Path(__file__).parent / "campaign" / "run.py"


def test_the_campaigns_short_form_finds_nothing() -> None:
    output = succeed(python(RUN, "--short"))
    *kinds, last = [line.split() for line in output.splitlines()[1:]]
    assert len(kinds) == 17 and last[0] == "all" and int(last[1]) > 100 and last[2] == "0", output
