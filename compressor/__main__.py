"""`python -m compressor`: the command."""

from compressor.cli import main

if __name__ == "__main__":
    main()
