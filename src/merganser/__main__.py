"""``python -m merganser``."""

import sys

from merganser.cli import main

sys.exit(main())
