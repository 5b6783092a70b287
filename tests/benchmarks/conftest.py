"""What is compiled here is looked at: it has to be what users get."""

from collections.abc import Iterator

import pytest

from tests.compilation import usual_compilation


@pytest.fixture(scope="module", autouse=True)
def _compiled_as_usual() -> Iterator[None]:
    with usual_compilation():
        yield
