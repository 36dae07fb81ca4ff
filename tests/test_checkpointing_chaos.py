"""ckpt-chaos, a third party's crash tester, on this library and on its peers."""

from pathlib import Path

import pytest

from tests.chaos_job import LIBRARIES

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("library", LIBRARIES)
def test_by_a_third_party(tmp_path: Path, record_property, library):
    pytest.importorskip("ckpt_chaos")
    if library in ("torch_checkpointing", "torchsnapshot", "deepspeed"):
        pytest.importorskip(library)
    from tests.chaos import examine

    counts = examine(library, 24, tmp_path)
    record_property("chaos", counts)
    assert "error" not in counts, counts["error"]
    if library == "longrail":
        assert counts["PASS"] == counts["points"] >= 12  # of the 24, as many as its events have
