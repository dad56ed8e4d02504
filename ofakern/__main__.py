"""`python -m ofakern` is the `ofakern` command."""

import sys

from ofakern.cli.main import main

sys.exit(main())
