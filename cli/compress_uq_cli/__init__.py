"""The command line: a thin shell over the public API of `compress_uq`."""
