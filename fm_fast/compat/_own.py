"""Whether a subclass, or an object, has methods of its own, which those that would call them in the original must then call."""


def are_its_own(thing: object, owner: type, *names: str) -> bool:
    """Whether these methods are those of the class ``owner``: neither a subclass nor the object itself has put others in their place."""
    return all(getattr(getattr(thing, name), "__func__", None) is getattr(owner, name) for name in names)
