"""Data sent through a network, one block's weights in memory at a time."""
