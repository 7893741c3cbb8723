"""A registry: name and typed arguments → object. No class is ever imported by a name in a file."""

from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from flplatform.core.errors import AlreadyExistsError, InvalidArgumentError, NotFoundError

T = TypeVar("T")


class Registry(Generic[T]):
    """Factories by name; each factory's keyword arguments come from a job or policy file.

    Args:
        what: what is registered, for messages: `aggregator`, `filter`.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._factories: dict[str, tuple[TypeAdapter[Any], Callable[[Any], T]]] = {}

    def register(self, name: str, arguments: Any, factory: Callable[[Any], T]) -> None:
        """Add `factory`, which takes one checked instance of `arguments` (a pydantic model).

        Raises:
            AlreadyExistsError: the name is taken.
        """
        if name in self._factories:
            raise AlreadyExistsError(f"{self._what} {name!r} is registered already")
        self._factories[name] = TypeAdapter(arguments), factory

    def names(self) -> list[str]:
        """Return the registered names, sorted."""
        return sorted(self._factories)

    def create(self, name: str, arguments: Mapping[str, Any], field: str = "") -> T:
        """Build the object registered under `name`.

        Raises:
            NotFoundError: no such name.
            InvalidArgumentError: an argument is unknown, missing or of the wrong type.
        """
        try:
            adapter, factory = self._factories[name]
        except KeyError:
            raise NotFoundError(
                f"there is no {self._what} {name!r}",
                field=field,
                hint=f"known: {', '.join(self.names())}",
            ) from None
        try:
            return factory(adapter.validate_python(dict(arguments)))
        except ValidationError as error:
            first = error.errors()[0]
            path = ".".join(str(part) for part in first["loc"])
            raise InvalidArgumentError(
                first["msg"], field=f"{field}.args.{path}" if field else f"args.{path}"
            ) from None
