#!/usr/bin/env python
"""Check PASCAL VOC 2007 and 2012 and write annotations in COCO format: see README.md in this folder."""

import sys

from mnc_d2.data.prepare.voc import main

if __name__ == "__main__":
    sys.exit(main())
