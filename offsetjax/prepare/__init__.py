"""What comes before a training: its noise, its cached latents, its grid of settings."""
