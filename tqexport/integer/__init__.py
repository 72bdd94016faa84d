"""Networks in integers from end to end: grids for every value, one exact model of the arithmetic, and its files."""
