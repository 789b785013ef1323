"""Many models in one go: what is asked, what is still good, what came of it."""
