"""`python -m hfkv`."""

import sys

from .cli import main

sys.exit(main())
