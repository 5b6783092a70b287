"""In the place of PyTorch for processes of the command, whose users have none."""

raise ImportError("tests run the command without PyTorch")
