"""``python -m resnet_fast`` is the ``resnet-fast`` command."""

import sys

from resnet_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
