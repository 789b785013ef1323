"""Mixed precision: a width for each tensor under a budget of bytes or of loss."""
