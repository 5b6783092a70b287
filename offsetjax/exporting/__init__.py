"""Models for other programs, and what they say of their training."""
