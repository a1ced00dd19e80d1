"""Reading and verifying what comes from outside, with size limits before parsing."""
