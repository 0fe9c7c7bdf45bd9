"""What a node is asked before it is known to have dltrain: versions, by a function that Ray sends along.

ray.remote(bare_versions()).remote()
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["bare_versions"]


def bare_versions() -> Callable[[], dict[str, str | None]]:
    """A function that returns the versions of Python and of the packages that must be alike, None where missing.

    It is made inside another one, so that it is pickled by value: one with a module's name would be imported there.
    """

    def versions() -> dict[str, str | None]:
        import platform
        from importlib import import_module
        from importlib.metadata import PackageNotFoundError, version

        found: dict[str, str | None] = {"Python": platform.python_version()}
        for name in ("dltrain", "ray", "torch", "deepspeed", "pyarrow"):
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                found[name] = None
        try:
            # Installed or sent along, it must be one that can be imported.
            found["dltrain"] = import_module("dltrain").__version__
        except ImportError:
            found["dltrain"] = None
        return found

    return versions
