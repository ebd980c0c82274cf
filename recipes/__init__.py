"""Programs: read top to bottom, run from a checkout as `python -m recipes.NAME`."""

import os

# torch's threads spin for milliseconds while they wait for each other. If another process uses the same cores, they
# spin while the thread that they wait for is descheduled: training was 5 to 7 times slower. A short spin costs little
# on an idle machine. torch reads the variable once, at its first import.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from recipes import old_names

old_names.install()
