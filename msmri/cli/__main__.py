"""``python -m msmri.cli`` is ``msmri``."""

from msmri.cli import main

main()
