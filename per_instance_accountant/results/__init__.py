"""What every result can do: become a table, a safe file, a script-free fragment, a picture."""

from per_instance_accountant.results.tabular import Tabular

__all__ = ["Tabular"]
