"""The rounding of shown bounds, under the name by which the rooms above know it."""

from per_instance_accountant.results.rounding import not_nan, rounded_up

__all__ = ["not_nan", "rounded_up"]
