"""``python -m minimoe``."""
import sys

from .cli import main

sys.exit(main())
