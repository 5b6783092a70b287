"""The mathematics of diffusion: noise, schedule, loss and sampler. No input or output, no model."""
