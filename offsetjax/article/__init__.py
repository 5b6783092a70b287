"""The small-scale re-enactment of N. Guttenberg, "Diffusion with Offset Noise" (CrossLabs, 2023)."""
