"""``python -m dissect`` is ``dissect``."""

from dissect.cli import main

main(prog_name="dissect")
