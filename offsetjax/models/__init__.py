"""The networks, behind one boundary: `build(config)`, then `init` and `apply`. Nothing else imports diffusers' Flax."""

import logging

import diffusers.utils.logging
import transformers.utils.logging

# Both libraries announce at each construction that their Flax classes will go; the versions are pinned for that.
diffusers.utils.logging.set_verbosity_error()
transformers.utils.logging.set_verbosity_error()
logging.getLogger("jax._src.xla_bridge").setLevel(logging.ERROR)
