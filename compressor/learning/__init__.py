"""Learning by gradient: the loops, and what they minimise."""
