"""Smaller networks: channels, heads, layers and blocks removed before anything is encoded."""
