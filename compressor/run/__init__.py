"""One run: its working folder, the order of its stages, its gates, its delivery."""
