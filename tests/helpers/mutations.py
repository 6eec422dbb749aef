"""Files that somebody has damaged, on purpose or not: each follows from a seed."""

from __future__ import annotations

import random
import struct

_NUMBERS = (0, 1, 2, 127, 128, 255, 256, 32_767, 65_535, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF)
# Beginnings and names of fields of the containers that are read.
_WORDS = (
    *(b"RIFF", b"WAVE", b"fmt ", b"data", b"ftyp", b"moov", b"mdat", b"stts", b"stsz", b"stco"),
    *(
        b"OggS",
        b"fLaC",
        b"\x89PNG",
        b"IHDR",
        b"IDAT",
        b"iCCP",
        b"\xff\xd8",
        b"\xff\xc0",
        b"\xff\xe1",
    ),
    *(b"\x1a\x45\xdf\xa3", b"ID3", b"GIF89a", b"II*\0", b"\0\0\0\0\0\0\0\0", b"#EXTM3U\nfile:a\n"),
)


def mutated(data: bytes, seed: int) -> bytes:
    """``data`` with one to four faults: bits, numbers, cuts, holes, repeats, foreign words.

    Half of the faults lie in the first kilobyte, where headers are.
    """
    rng = random.Random(seed)
    content = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        length = max(1, len(content))
        place = rng.randrange(min(length, 1024) if rng.random() < 0.5 else length)
        kind = rng.randrange(8)
        if kind == 0:
            for _ in range(rng.randint(1, 20)):
                at = min(place + rng.randrange(64), length - 1)
                content[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            order = rng.choice((">I", "<I", ">H", "<H"))
            most = 0xFFFF_FFFF if order.endswith("I") else 0xFFFF
            number = struct.pack(order, rng.choice(_NUMBERS) & most)
            content[place : place + len(number)] = number
        elif kind == 2:
            del content[place:]  # cut off
        elif kind == 3:
            del content[place : place + rng.randint(1, 256)]
        elif kind == 4:
            content[place:place] = content[place : place + rng.randint(1, 4096)]
        elif kind == 5:
            word = rng.choice(_WORDS)
            content[place : place + len(word)] = word
        elif kind == 6:
            content[place:place] = bytes(rng.randint(1, 4096))
        else:
            half = content[place:]
            half.reverse()
            content[place:] = half
    return bytes(content)
