"""Ships `assets/`, `pipelines/` and `rewards/` inside the wheel; an editable install reads them from the checkout."""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class DataHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version != "editable":
            for folder in ("assets", "pipelines", "rewards"):
                build_data["force_include"][folder] = f"diffalign/_data/{folder}"
