"""What a training will need and how fast it may be, from its compiled step, on a machine that has none of its chips."""
