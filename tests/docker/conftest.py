import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]):
    if "docker" not in config.getoption("markexpr"):
        for item in items:
            if item.get_closest_marker("docker"):
                item.add_marker(
                    pytest.mark.skip(reason="builds images for some ten minutes: bash tests/run.sh -m docker")
                )
