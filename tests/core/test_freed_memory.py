"""Freed memory: kept while it is asked for, and given back, each tried in a process of its own."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from compressor.core.memory import _mallinfo

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left alone")
START = """
import numpy as np
from compressor.core.machine import memory_of
from compressor.core.memory import freed_is_kept, give_back
def resident():
    return memory_of()["resident"] >> 20
def use():
    several = [np.ones(1 << 20) for _ in range(16)]
    pinned.append(bytearray(1 << 12))
pinned = []
"""


def printed(code: str) -> list[int]:
    done = subprocess.run([sys.executable, "-c", START + code], capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


def test_what_is_freed_is_kept_within_and_given_back_at_the_end():
    before, kept, after = printed(
        "before = resident()\n"
        "with freed_is_kept():\n    use(); kept = resident()\n"
        "print(before, kept, resident())\n"
    )  # fmt: skip
    assert kept - before > 100
    assert after - before < 16


def test_at_the_end_large_arrays_go_back_by_themselves_again():
    before, after = printed(
        "with freed_is_kept():\n    use()\n"
        "before = resident(); use(); print(before, resident())\n"
    )  # fmt: skip
    assert after - before < 16


def test_the_end_comes_with_an_error_too():
    before, after = printed(
        "before = resident()\n"
        "try:\n    with freed_is_kept():\n        use(); raise ValueError\n"
        "except ValueError:\n    print(before, resident())\n"
    )  # fmt: skip
    assert after - before < 16


@pytest.mark.parametrize(("most", "given_back"), [(64, True), (512, False)])
def test_slack_goes_back_once_it_is_more_than_was_allowed(most, given_back):
    before, kept, after = printed(
        "from compressor.core.memory import Slack\n"
        f"with freed_is_kept():\n    slack = Slack({most} << 20); before = resident()\n"
        "    use(); kept = resident(); slack.give_back(); print(before, kept, resident())\n"
    )
    assert kept - before > 100
    assert (after - before < 16) == given_back


@pytest.mark.skipif(_mallinfo() is None, reason="this glibc does not tell what is in use")
def test_what_is_in_use_is_no_slack():
    before, after = printed(
        "from compressor.core.memory import Slack\n"
        "with freed_is_kept():\n    slack = Slack(160 << 20); before = resident()\n"
        "    held = [np.ones(1 << 20) for _ in range(12)]; use(); slack.give_back(); print(before, resident())\n"
    )
    assert after - before > 200  # 96 held, 128 free: less than was allowed


def test_an_opened_session_has_given_back_what_folding_took(tmp_path):
    import onnx
    from onnx import parser

    fold = "".join(f"a{i} = Expand(x{i}, shape) y{i} = ReduceSum <keepdims = 0> (a{i}) " for i in range(16))
    sums = "z1 = Add(y0, y1) " + "".join(f"z{i} = Add(z{i - 1}, y{i}) " for i in range(2, 16))
    constants = ", ".join(f"float[1] x{i} = {{{i}.0}}" for i in range(16))
    onnx.save(
        parser.parse_model(
            '<ir_version: 10, opset_import: ["" : 21]> net (float x) => (float out) '
            f"<int64[1] shape = {{2097152}}, {constants}> {{ {fold}{sums}out = Add(x, z15) }}"
        ),
        tmp_path / "model.onnx",
    )
    before, peak, after = printed(
        "from compressor.runtime.sessions import Settings\n"
        "with freed_is_kept():\n"
        f"    before = resident(); session = Settings(1).open({str(tmp_path / 'model.onnx')!r})\n"
        "    print(before, memory_of()['peak_resident'] >> 20, resident())\n"
    )
    assert peak - before > 100
    assert after - before < 32
