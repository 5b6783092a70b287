"""The CRC-32 of each tensor, in the header of the safetensors files that are exported.

`__metadata__` has them under `offsetjax.crc32`: eight hexadecimal digits a tensor, in the order of the tensors' bytes,
of its name, dtype, shape and bytes. They are against disks and copies that change a bit, not against attackers.

A program that merges or converts a model of ours may take its metadata over, with the checksums of other weights. Ours
count only in a header that ends with `ENDING`: it is eight spaces, where the safetensors library, with which such
programs write, pads to a multiple of eight bytes and so has at most seven.
"""

import re
import zlib
from collections.abc import Iterable, Sequence

from offsetjax.formats.header import Entry

KEY = "offsetjax.crc32"
ENDING = b" " * 8


def begin(entry: Entry) -> int:
    """The CRC-32 of what the header says of a tensor, to go on from with its bytes (`zlib.crc32(bytes, begin)`)."""
    text = f"{entry.name}\n{entry.dtype.name}\n{entry.shape}\n"
    return zlib.crc32(text.encode(errors="surrogatepass"))  # a stranger's header can hold half of a pair


def format_sums(sums: Iterable[int]) -> str:
    """`[1, 2] -> "0000000100000002"`, whose length depends on the number of tensors alone."""
    return "".join(f"{each:08x}" for each in sums)


def parse_sums(text: str, entries: Sequence[Entry]) -> dict[str, int]:
    """The checksums by the tensors' names.

    Raises:
        ValueError: it is not the text of so many.
    """
    if not re.fullmatch(r"[0-9a-f]*", text) or len(text) != 8 * len(entries):
        raise ValueError(f"{KEY} has not 8 hexadecimal digits for each of its {len(entries)} tensors")
    return {entry.name: int(text[8 * place : 8 * place + 8], 16) for place, entry in enumerate(entries)}
