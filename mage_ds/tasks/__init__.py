"""One job, one file, read from top to bottom."""
