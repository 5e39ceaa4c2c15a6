"""`python -m sdpo.artifacts list|verify|prune`."""

import sys

from sdpo.artifacts.inventory import main
from sdpo.errors import UserError

try:
    main(sys.argv[1:])
except UserError as error:
    sys.exit(f"error: {error}")
