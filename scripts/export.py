#!/usr/bin/env python
"""``hypersd export`` for a clone: python scripts/export.py --ckpt Hyper-SDXL-1step-lora"""

import sys

try:
    from hypersd.cli import main
except ModuleNotFoundError as error:
    if error.name != "hypersd":
        raise
    sys.exit("hypersd is not installed for this Python: run scripts/quickstart.sh, then use .venv/bin/python")

sys.exit(main(["export", *sys.argv[1:]]))
