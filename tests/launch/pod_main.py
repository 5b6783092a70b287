"""The command `offsetjax`, whose processes all find what the first of them has compiled, as those of a TPU pod do.

On CPUs JAX looks for what a program was compiled to by the process too, of which only the first writes.
"""

import sys

from jax._src import cache_key

cache_key._hash_accelerator_config = lambda hash_obj, accelerators: None  # type: ignore[assignment]

if __name__ == "__main__":
    from offsetjax.cli import main

    sys.exit(main())
