"""Names that a library in memory gives to functions which are there under other ones."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="the format is that of Linux")

GIVEN = """
import ctypes
from agent_memory_core.symbol_aliases import load_aliases

C = ctypes.CDLL("libc.so.6")
PRODUCTS = {"twice_as_absolute": "labs", "a": "abs", "toupper_" * 40: "toupper", "lower": "tolower"}
load_aliases({name: ctypes.cast(C[real], ctypes.c_void_p).value for name, real in PRODUCTS.items()})
seen = ctypes.CDLL(None)
print(seen.a(-3), seen["toupper_" * 40](97), seen.lower(65), seen.twice_as_absolute(-4))
print(hasattr(seen, "nobody"), hasattr(seen, "aa"))
load_aliases({"a": ctypes.cast(C["toupper"], ctypes.c_void_p).value, "later": 0x1234})
print(seen.a(-3), ctypes.cast(seen.later, ctypes.c_void_p).value)
print(*[line.split()[1] for line in open("/proc/self/maps") if "aliases" in line])
"""


def test_names_are_found_at_their_addresses_and_nothing_of_it_can_be_executed() -> None:
    """In a process of its own, which keeps them. Who was first keeps a name."""
    done = subprocess.run([sys.executable, "-c", GIVEN], capture_output=True, text=True, check=True)
    called, absent, later, mapped = done.stdout.splitlines()
    assert called == "3 65 97 4"
    assert absent == "False False"
    assert later == f"3 {0x1234}"
    assert mapped.split() == ["rw-p", "rw-p"]


def test_the_names_of_this_process_stay_as_they_are() -> None:
    assert not hasattr(ctypes.CDLL(None), "twice_as_absolute")
