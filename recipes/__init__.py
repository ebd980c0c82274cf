"""Programs: read top to bottom, run from a checkout as `python -m recipes.NAME`."""

import os

# torch's threads wait for each other by spinning for milliseconds. Where something else runs on the same cores, they
# spin while the one they wait for is not running: training was 5 to 7 times slower. A short spin costs an idle machine
# little. Read once, when torch is first imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
