"""`vq4dit.__all__` is the promise: sorted, complete, documented."""

import inspect
import types

import pytest

import vq4dit


def test_public_names_are_sorted_and_listed_once():
    assert vq4dit.__all__ == sorted(set(vq4dit.__all__))


def test_public_names_are_all_there_is():
    public = {name for name, value in vars(vq4dit).items() if name[0] != "_" and not isinstance(value, types.ModuleType)}
    assert set(vq4dit.__all__) == public


@pytest.mark.parametrize("name", vq4dit.__all__)
def test_public_names_have_a_docstring_of_their_own(name):
    value = getattr(vq4dit, name)
    doc = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    assert doc and doc.strip()
    assert not doc.startswith(f"{name}("), "this is what dataclass writes where there is none"
