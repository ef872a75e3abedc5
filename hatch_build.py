"""Ships `assets/`, `pipelines/` and `rewards/` inside the wheel; an editable install reads them from the checkout."""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class DataHook(BuildHookInterface):
    """Adds the data folders to a wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before a build."""
        if version != "editable":
            for folder in ("assets", "pipelines", "rewards"):
                build_data["force_include"][folder] = f"diffalign/_data/{folder}"
