"""The commands of the command line. Each imports what it needs, so that verifying needs no torch."""
