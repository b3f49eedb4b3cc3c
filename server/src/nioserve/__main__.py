"""`python -m nioserve`."""

import sys

from nioserve.cli import main

sys.exit(main())
