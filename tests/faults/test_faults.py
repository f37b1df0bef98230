"""The fault campaign in its short form: a fixed choice of all kinds. The whole one is `python tests/faults`."""

import pytest
from campaign import Case, some_of_each_group
from kinds import KINDS
from worker import Worker, command_server

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
