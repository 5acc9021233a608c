"""Attributes that an optimizer has in common with those who stand in for it."""

from typing import Any, Generic, TypeVar, overload

T = TypeVar("T")


class Kept(Generic[T]):
    """An attribute that is written where the optimizer itself finds it, whoever `self` is.

    Lightning and Fabric hand out stand-ins: objects of a class derived from the optimizer's, which pass on the
    attributes that they lack. Methods run with the stand-in as `self`, and what they assigned would stay there.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> "Kept[T]": ...

    @overload
    def __get__(self, instance: Any, owner: type) -> T: ...

    def __get__(self, instance: Any, owner: type) -> "Kept[T] | T":
        if instance is None:
            return self
        try:
            return instance._kept[self.name]
        except KeyError:
            raise AttributeError(f"{owner.__name__} has no attribute {self.name!r} yet") from None

    def __set__(self, instance: Any, value: T) -> None:
        kept = getattr(instance, "_kept", None)
        if kept is None:  # the optimizer itself, about to be built
            kept = instance.__dict__["_kept"] = {}
        kept[self.name] = value
