"""``python -m longpretrain VERB`` is ``longpretrain VERB``."""

import sys

from longpretrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
