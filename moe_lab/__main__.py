"""Lets `python -m moe_lab` be the `moe-lab` command."""

import sys

from moe_lab.cli import main

sys.exit(main())
