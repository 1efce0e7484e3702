"""Print the table of the docs."""

from bad import table

print(table(), end="")
