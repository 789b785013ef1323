"""What a network is made of: blocks, layers, and which channels hang together."""
