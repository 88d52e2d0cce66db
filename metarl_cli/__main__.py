"""`python -m metarl_cli` is `metarl`."""

import sys

from metarl_cli.cli import main

sys.exit(main())
