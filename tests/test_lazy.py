"""Names that packages import when they are first used."""

import importlib

import pytest

PACKAGES = ["diffmas", "diffmas.agents", "diffmas.evaluation", "diffmas.models", "diffmas.trace", "diffmas.training"]


@pytest.mark.parametrize("package", PACKAGES)
def test_names_are_listed_and_found(package):
    """Listed for whoever completes what is typed; a name stands for one thing, whatever was imported before."""
    module = importlib.import_module(package)
    assert {*module.__all__} <= {*dir(module)}
    for name in module.__all__:
        found = getattr(module, name)
        if name in module._WHERE:
            importlib.import_module(module._WHERE[name])
            assert getattr(module, name) is found and not isinstance(found, type(pytest))
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        module.nothing  # noqa: B018
