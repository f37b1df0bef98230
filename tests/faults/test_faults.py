"""The fault campaign in its short form: a fixed choice of all kinds. The whole one is `python tests/faults`."""

import pytest
from campaign import Case, lost, some_of_each_group
from kinds import KINDS
from worker import Outcome, Worker, command_server

SEED = 0
PROMISED = {"kills": 40, "output_paths": 40, "configs": 100, "mutations": 360, "tampering": 20}
CASES = {name: kind.cases(SEED) for name, kind in KINDS.items()}
CHOSEN = [case for name, kind in KINDS.items() for case in some_of_each_group(CASES[name], kind.SHORT, SEED)]


@pytest.fixture(scope="module")
def worker():
    with command_server() as folder:
        worker = Worker(folder)
        yield worker
        worker.close()


@pytest.mark.parametrize("case", CHOSEN, ids=lambda case: case.id)
def test_what_goes_wrong_is_told_and_nothing_is_lost(worker: Worker, case: Case):
    complaints = case.run(worker)
    again = f'python tests/faults --only "{case.id}" --seed {SEED}'
    assert not complaints, "\n".join([again, *(f"{complaint.kind}: {complaint.text}" for complaint in complaints)])


@pytest.mark.parametrize("kind", PROMISED)
def test_the_whole_campaign_is_as_large_as_promised_and_each_case_can_be_named(kind):
    names = [case.id for case in CASES[kind]]
    assert len(names) == len(set(names)) >= PROMISED[kind]
    assert all(name.startswith(f"{kind}/") for name in names)


@pytest.mark.parametrize(
    "ending, kind",
    [
        ({"code": 1, "output": "Traceback (most recent call last):\nKeyError: 'a'"}, "tracebacks"),
        ({"code": -24, "hung": True}, "hangs"),
        ({"code": -11}, "wrong exit codes"),
        ({"code": 1, "output": "error: one\n\nand more"}, "no paragraph"),
        ({"growth": 2}, "large allocations"),
        ({"output": "a \x1b[31mred word"}, "control characters"),
        ({"code": 1, "output": "error: what it is, and what to do"}, None),
    ],
    ids=str,
)
def test_each_bad_ending_is_noticed(ending, kind):
    well = {"code": 0, "hung": False, "seconds": 0.1, "growth": 0, "changes": 0, "output": ""}
    found = [complaint.kind for complaint in Outcome(**(well | ending)).complaints(growth=1)]
    assert found == ([kind] if kind else [])


def test_a_lost_folder_is_told_once_and_what_is_ours_does_not_count():
    before = {"a": None, "a/b": None, "a/b/c": b"1", "empty": None, "link": "x", "ours": b"2", "kept": b"3"}
    found = [complaint.text for complaint in lost(before, {"link": "y", "kept": b"3"}, ours={"ours"})]
    assert found == ["'a' is gone", "'link' was changed"]
