"""The reader of the package `gguf`, made to read arrays in one pass.

The package makes several objects of numpy for every element of an array, which takes seconds for a
vocabulary. Here an array of numbers is one view of the file, and a string is a slice of it.
"""

import struct
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType

LENGTH = struct.Struct("=Q")


class ArrayReader(GGUFReader):
    """A `GGUFReader` whose fields are read by `contents()`, as the package's own are.

    Where a file ends within an array, what is read next is not there, and that is an error.
    """

    def _get_field_parts(
        self, orig_offs: int, raw_type: int
    ) -> tuple[int, list[Any], list[int], list[GGUFValueType]]:
        """Bytes of a field, its parts, which of them are its data, and their types."""
        if self.byte_order == "S":
            raise ValueError("its byte order is that of another machine")
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        item = GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
        count = int(self._get(orig_offs + 4, np.uint64)[0])
        start = orig_offs + 12
        if item == GGUFValueType.STRING:
            parts, stop = self._read_strings(start, count)
        elif item in self.gguf_scalar_to_np:
            numbers = self._get(start, self.gguf_scalar_to_np[item], count)
            parts = [numbers]
            stop = start + numbers.nbytes
        else:
            raise ValueError(f"an array of {item.name} is not known")
        return stop - orig_offs, parts, list(range(len(parts))), [GGUFValueType.ARRAY, item]

    def _read_strings(self, start: int, count: int) -> tuple[list[memoryview], int]:
        """Strings in UTF-8, each behind its length in 8 bytes, and where the last one ends."""
        content = memoryview(self.data)
        strings = []
        for _ in range(count):
            (length,) = LENGTH.unpack_from(content, start)
            start += LENGTH.size
            strings.append(content[start : start + length])
            start += length
        return strings, start
