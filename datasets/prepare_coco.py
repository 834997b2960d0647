#!/usr/bin/env python
"""Check that COCO is complete: see README.md in this folder."""

import sys

from mnc_d2.data.prepare.coco import main

if __name__ == "__main__":
    sys.exit(main())
