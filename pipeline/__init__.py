"""Train, convert, fine-tune, quantise, export and check; attacks; the command line."""
