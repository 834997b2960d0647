#!/usr/bin/env python
"""Check SBD and write the annotations of voc_2012_sds_train and voc_2012_sds_val: see README.md in this folder."""

import sys

from mnc_d2.data.prepare.sbd import main

if __name__ == "__main__":
    sys.exit(main())
