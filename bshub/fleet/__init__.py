"""Many models: a list in, one artifact each and one summary out, on Ray."""
