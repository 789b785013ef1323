"""Pure functions on tensors and numbers."""
