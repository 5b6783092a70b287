"""What lies on disk between two steps: checkpoints, and the checksums that find a changed bit."""
