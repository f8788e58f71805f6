"""The artifact: a compiled program in one file, loaded without recompiling and without pickle."""

from regraft.artifact.archive import Loaded, load, save
from regraft.artifact.container import Limits
from regraft.artifact.errors import ArtifactError
from regraft.artifact.manifest import FORMAT_VERSION, Manifest, Member

__all__ = ["FORMAT_VERSION", "ArtifactError", "Limits", "Loaded", "Manifest", "Member", "load", "save"]
