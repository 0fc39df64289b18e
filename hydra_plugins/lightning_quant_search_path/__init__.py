"""Makes the config groups of lightning_quant usable in every Hydra app: Hydra looks for plugins in this package."""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from lightning_quant.cli.configuration import config_dir


class LightningQuantSearchPath(SearchPathPlugin):
    """Appends the groups ``precision``, ``quantizer``, ``ladder``, ``target`` …: an app's own of those names win."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Called by Hydra at the start of every app."""
        own = str(config_dir())
        known = [str(entry.path).removeprefix("file://") for entry in search_path.get_path()]
        if own not in known:  # the app of this package has it already
            search_path.append(provider="lightning_quant", path=f"file://{own}")
