"""Old names that still work for one release, each with a FutureWarning that names the new one."""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def warn_renamed(old: str, new: str, *, stacklevel: int = 3) -> None:
    """Warn that `old` is called `new` now."""
    warnings.warn(
        f"{old} is now {new}; the old name goes away in the next release.", FutureWarning, stacklevel=stacklevel
    )


def renamed_names(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """A module's `__getattr__` that finds old names: old → new in the same module, or "package.module.name"."""

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        new = names[name] if "." in names[name] else f"{module}.{names[name]}"
        warn_renamed(f"{module}.{name}", new)
        home, _, attribute = new.rpartition(".")
        return getattr(importlib.import_module(home), attribute)

    return find


def renamed_attribute(old: str, new: str) -> Any:
    """A property of a class: the attribute `old` reads and sets `new`."""

    def get(self: Any) -> Any:
        warn_renamed(f"{type(self).__name__}.{old}", new)
        return getattr(self, new)

    def put(self: Any, value: Any) -> None:
        warn_renamed(f"{type(self).__name__}.{old}", new)
        setattr(self, new, value)

    return property(get, put, doc=f"The old name of `{new}`.")


def renamed_arguments(**names: str) -> Callable[[F], F]:
    """A decorator: the keyword arguments old=new are still taken by their old names."""

    def decorate(function: F) -> F:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for old in names.keys() & kwargs.keys():
                new = names[old]
                if new in kwargs:
                    raise TypeError(f"{function.__qualname__} got both {old!r} and {new!r}, which are the same.")
                warn_renamed(f"The argument {old!r} of {function.__qualname__}", repr(new))
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


class MovedModule(types.ModuleType):
    """A module by its old name. Callable like the function of that name, which its import hides in the package."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


class MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules by the names they had: old → (new, old names in it → new ones)."""

    def __init__(self, moved: Mapping[str, str], names: Mapping[str, str]):
        self.moved, self.names = moved, names

    def find_spec(
        self, fullname: str, _path: Iterable[str] | None = None, _target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.moved:
            return None
        return importlib.util.spec_from_loader(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        new = self.moved[spec.name]
        warn_renamed(f"The module {spec.name}", new)
        target, made = importlib.import_module(new), MovedModule(spec.name, f"The old name of {new}.")

        def find(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return getattr(target, self.names.get(name, name))

        made.__getattr__ = find  # type: ignore[method-assign]
        return made

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing: the module looks everything up in the new one."""

    def install(self) -> None:
        """Look here for modules that are not found elsewhere."""
        sys.meta_path.append(self)
