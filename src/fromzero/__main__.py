"""`python -m fromzero` is `fromzero`."""

from fromzero.cli import main

raise SystemExit(main())
