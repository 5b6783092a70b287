"""The networks, behind one boundary: `build(config)`, then `init` and `apply`. Nothing else imports diffusers' Flax."""

import sys

import offsetjax

# diffusers imports these wherever they are installed, which takes seconds, and its Flax classes use neither. A program
# that imports offsetjax may want diffusers' PyTorch classes too; the command never does.
_hidden = [name for name in ("torch", "transformers") if offsetjax.is_program and name not in sys.modules]
sys.modules.update(dict.fromkeys(_hidden))  # type: ignore[arg-type]  # None: as if it were not installed
try:
    import diffusers.utils.logging

    # diffusers announces at each construction that its Flax classes will go; its version is pinned for that.
    diffusers.utils.logging.set_verbosity_error()
finally:
    for _name in _hidden:
        del sys.modules[_name]
