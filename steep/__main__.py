"""``python -m steep``."""

from steep.cli import main

if __name__ == "__main__":
    main()
