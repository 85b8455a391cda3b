"""``python -m msmri`` is ``msmri``."""

from msmri.cli import main

main()
