"""Every public function and module shows an example in its docstring, and it runs as shown."""

import doctest
import inspect

import pytest

import mics_kernels
from mics_kernels import backends, philox

PUBLIC = {name: getattr(mics_kernels, name) for name in mics_kernels.__all__}
SHOWN = {
    **{
        name: public
        for name, public in PUBLIC.items()
        if not (inspect.isclass(public) and issubclass(public, tuple))  # results need none
    },
    "backends.explain": backends.explain,
    "philox.philox4x32": philox.philox4x32,
    "philox.normals": philox.normals,
}


@pytest.mark.parametrize("name", SHOWN)
def test_the_example_of_a_docstring_runs_as_shown(name: str) -> None:
    example = doctest.DocTestParser().get_doctest(
        inspect.getdoc(SHOWN[name]) or "", {}, name, None, None
    )
    assert example.examples, f"{name} has no example"
    assert doctest.DocTestRunner().run(example).failed == 0
