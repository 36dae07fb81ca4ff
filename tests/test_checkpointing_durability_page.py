"""The page on durability names every proof, and its table was written by the script."""

from tests import durability_counts
from tests.durability_counts import BEGIN, END, PAGE, PROOFS
from tests.spawn import ROOT


def test_every_proof_stands_in_the_table_with_its_counts():
    table = PAGE.read_text().split(BEGIN)[1].split(END)[0]
    for file, what in PROOFS.values():
        assert (ROOT / "tests" / f"{file}.py").exists()
        (row,) = (line for line in table.splitlines() if f"`tests/{file}.py`" in line)
        assert what in row
        passed, failed, _ = (int(number) for number in row.split("|")[2].split(","))
        assert passed > 0
        assert failed == 0


def test_the_counts_are_summed_and_the_longest_time_is_kept(tmp_path):
    report = tmp_path / "report.xml"
    properties = "<properties><property name=\"lost\" value=\"{'cases': 2, 'longest_s': %s}\"/></properties>"
    report.write_text(
        '<testsuite><testcase classname="tests.test_checkpointing_lost" name="a">' + properties % 3.5 + "</testcase>"
        '<testcase classname="tests.test_checkpointing_lost" name="b">' + properties % 1.0 + "</testcase>"
        '<testcase classname="tests.test_checkpointing_lost" name="c"><skipped/></testcase></testsuite>'
    )
    found, chaos = durability_counts.read([report, report])
    assert chaos == []
    assert found["test_checkpointing_lost"].counts == {"cases": 4, "longest_s": 3.5}
    assert "| 2, 0, 1 | cases 4, longest s 3.5 |" in durability_counts.table(found, chaos, "2026-11-26")
