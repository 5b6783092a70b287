"""The networks, behind one boundary: `build(config)`, then `init` and `apply`. Nothing else imports diffusers' Flax."""

import diffusers.utils.logging

# diffusers announces at each construction that its Flax classes will go; its version is pinned for that.
diffusers.utils.logging.set_verbosity_error()
