"""``python -m merganser``.

Python puts the current directory first on the path then, and what lies there would shadow the modules that a merge
needs. It is taken away again before anything else is imported.
"""

import os
import sys

if sys.path[:1] in ([""], [os.getcwd()]):  # noqa: PTH109 - pathlib is not imported yet
    del sys.path[0]

from merganser.cli import main

sys.exit(main())
