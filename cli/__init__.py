"""The command line of bshub."""
