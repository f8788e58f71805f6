"""The base of every error whose message is written for users."""

from __future__ import annotations


class RegraftError(Exception):
    """Something that the user gave or asked for does not work; the message is one clear sentence."""


class FailedAssertion(RuntimeError):
    """What a model asserts of the values of a call does not hold; the message is the model's."""
