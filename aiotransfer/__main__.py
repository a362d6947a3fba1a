"""`python -m aiotransfer`."""

from aiotransfer.cli import main

raise SystemExit(main())
