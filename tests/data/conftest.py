"""The scripts of data/ are no package: they find each other as they do when one is started."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "data"))
