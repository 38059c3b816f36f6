"""``python -m per_instance_accountant`` is the command ``pia``."""

from per_instance_accountant.cli import main

main()
