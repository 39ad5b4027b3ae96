"""Run the command line as `python -m vlmfilm_plugin`."""

import sys

from vlmfilm_plugin.cli import main

sys.exit(main())
