"""A module that stands in for another one: its weights, its modes and its attributes are that one's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

from torch import Tensor, nn

from regraft.errors import InputError


class StandIn(nn.Module):
    """Has no weights of its own: ``parameters``, ``state_dict``, ``to``, ``train`` and unknown attributes (``config``…)
    are those of ``original``, where there is one, to read and to set.

    A subclass sets ``self.__dict__["_original"]`` first, and ``self.__dict__["_closed"] = True`` when its own
    attributes are made: what is set from then on under another name is the original's.
    """

    @property
    def original(self) -> nn.Module | None:
        """The module stood in for; None when there is none."""
        model: nn.Module | None = self.__dict__.get("_original")
        return model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if self.original is None or name.startswith("__"):
                raise
            return getattr(self.original, name)

    def __setattr__(self, name: str, value: Any) -> None:
        own = not self.__dict__.get("_closed") or name in self.__dict__ or hasattr(type(self), name)
        if own or self.original is None:
            super().__setattr__(name, value)
        else:
            setattr(self.original, name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"a {type(self).__name__} cannot be pickled; write it with its method save(), or pickle the model"
        )

    def train(self, mode: bool = True) -> Self:
        """Sets the original's mode."""
        self.training = mode
        if self.original is not None:
            self.original.train(mode)
        return self

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The original's parameters."""
        return iter(()) if self.original is None else self.original.named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        """The original's buffers."""
        return iter(()) if self.original is None else self.original.named_buffers(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The original's state."""
        if self.original is not None:
            return self.original.state_dict(*args, **kwargs)
        return kwargs.get("destination") if kwargs.get("destination") is not None else {}

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load into the original; raises ``InputError`` when there is none."""
        return self._loadable().load_state_dict(*args, **kwargs)

    def _loadable(self) -> nn.Module:
        if self.original is None:
            raise InputError(
                "there is no original model to load weights into; compile the model again with the new ones"
            )
        return self.original

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Called when a module that holds this one loads its state."""
        own = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        if self.original is None and not own:
            return
        try:
            result = self._loadable().load_state_dict(own, strict=False)
        except (RuntimeError, InputError) as error:  # sizes that differ
            error_msgs.append(str(error))
            return
        missing_keys += [prefix + key for key in result.missing_keys]
        unexpected_keys += [prefix + key for key in result.unexpected_keys]

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        if self.original is not None:
            self.original._apply(*args, **kwargs)
        return self
