"""Memory and processor as the system tells them, held against what is known to have happened."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys

import pytest

from compressor.core.machine import available_memory, cores, memory_of, multiplies_bfloat16, private_memory

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
MEGABYTE = 1 << 20


def test_available_memory_is_below_what_the_machine_has():
    import psutil

    assert 0 < available_memory() <= psutil.virtual_memory().total


def test_cores_are_those_that_the_process_may_use():
    assert 1 <= cores() <= (os.cpu_count() or 1)


@on_linux
def test_cores_heed_the_affinity_of_the_process():
    one = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, [{one}]); from compressor.core.machine import cores; print(cores())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"


@on_linux
def test_private_memory_grows_with_what_is_allocated_and_shrinks_with_it():
    before = private_memory() or 0
    with mmap.mmap(
        -1, 64 * MEGABYTE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    ) as block:  # the system's own: what C frees it may keep
        block.write(b"x" * (64 * MEGABYTE))
        held = private_memory() or 0
        assert held - before > 60 * MEGABYTE
    assert held - (private_memory() or 0) > 60 * MEGABYTE


@on_linux
def test_the_peak_stays_when_memory_is_freed_and_is_not_the_parents():
    code = (
        "from compressor.core.machine import memory_of\n"
        "before = memory_of(); block = bytearray(1) * (128 << 20); del block; after = memory_of()\n"
        "print(before['peak_resident'], after['peak_resident'], after['resident'])\n"
    )
    parents = bytearray(1) * (256 * MEGABYTE)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, peak, resident = map(int, done.stdout.split())
    assert before < len(parents) / 2
    assert peak - before > 120 * MEGABYTE and peak - resident > 120 * MEGABYTE


@on_linux
def test_the_parts_of_memory_add_up():
    found = memory_of()
    assert found["private"] and found["mapped"] and found["resident"] and found["peak_resident"]
    assert found["private"] + found["mapped"] == found["resident"] <= found["peak_resident"] + MEGABYTE


def test_of_a_process_that_has_ended_nothing_is_known():
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert private_memory(ended.pid) is None
    assert set(memory_of(ended.pid).values()) == {None}


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_elsewhere_what_is_private_is_not_known(monkeypatch, system):
    monkeypatch.setattr(sys, "platform", system)
    assert private_memory() is None


@on_linux
def test_bfloat16_in_hardware_is_as_torch_says():
    torch = pytest.importorskip("torch")
    assert multiplies_bfloat16() == (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@on_linux
def test_near_its_limit_a_process_is_told_so_without_importing_anything():
    """An import that runs out of memory may end in any error, and then what went wrong is told as a bug."""
    code = (
        "import resource, sys\n"
        "from compressor.core import machine\n"
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmPeak:')).split()[1]\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1536 * int(peak), -1))\n"
        "sys.meta_path.clear()\n"
        "print(machine.is_scarce(), 'psutil' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.split(), done.stderr) == (["True", "False"], "")
