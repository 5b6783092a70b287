"""From a batch to the next state, and what a training measures of itself."""
