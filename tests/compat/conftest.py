"""Makes the helpers of ``tests`` importable when only this directory is tested."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
