"""The study of noise in small: each kind from scratch, with several seeds, compared by the brightness it draws."""
