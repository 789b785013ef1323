"""What a recipe would do, from headers alone: bytes, memory, time."""
