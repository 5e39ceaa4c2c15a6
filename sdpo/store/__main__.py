"""`python -m sdpo.store list|verify|prune`."""

import sys

from sdpo.errors import UserError
from sdpo.store.inventory import main

try:
    main()
except UserError as error:
    sys.exit(f"error: {error}")
