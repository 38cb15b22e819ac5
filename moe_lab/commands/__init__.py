"""Sub-commands that show on the command line what other modules work out."""
