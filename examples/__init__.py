"""Examples to copy from; the package is importable, so that the command line can name what is in it."""
