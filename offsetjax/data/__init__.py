"""Pictures and captions: a folder becomes a data set (`build`), that or its latents (`cache`) batches (`stream`)."""
