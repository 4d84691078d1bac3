import sys

from mage_ds.cli import main

if __name__ == "__main__":
    sys.exit(main())
