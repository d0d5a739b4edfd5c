"""``python -m hypersd.cli``."""

import sys

from . import main

sys.exit(main())
