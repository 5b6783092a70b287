"""Pictures and captions: a folder becomes a data set (`build`), and a data set the stream of batches (`stream`)."""
