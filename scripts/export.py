#!/usr/bin/env python
"""``hypersd export`` for a clone: python scripts/export.py --ckpt Hyper-SDXL-1step-lora"""

import sys

from hypersd.cli import main

sys.exit(main(["export", *sys.argv[1:]]))
