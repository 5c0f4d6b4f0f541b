"""``python -m torch_kvq``: see :mod:`torch_kvq.cli`."""

import sys

from torch_kvq.cli import main

sys.exit(main())
