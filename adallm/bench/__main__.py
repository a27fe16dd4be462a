"""``python -m adallm.bench``."""

import sys

from adallm.bench import main

sys.exit(main())
