"""What is read of JAX's own is there, in the versions that it was tried with."""

import jax

from offsetjax.parallel import private


def test_what_is_private_is_there() -> None:
    assert jax.__version__ in private.TRIED, (
        "read offsetjax/parallel/private.py against this version of jax, and add it"
    )
    state = private.distributed()
    assert {"client", "service", "process_id", "num_processes"} <= set(vars(type(state))) | set(vars(state))
    assert isinstance(private.is_cloud_tpu_vm(), bool)
