"""Several devices and processes as one: the mesh, sharding, signals, and what hangs or is lost."""
