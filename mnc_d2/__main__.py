"""``python -m mnc_d2`` is the command ``mnc``."""

from .cli import main

if __name__ == "__main__":
    main()
