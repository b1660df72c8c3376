"""An exception as one line that says what is wrong, and with what."""

from __future__ import annotations

import difflib
import errno
import re
import traceback
from typing import Any


def one_line(error: BaseException) -> str | None:
    """What a person needs to know, on one line; None where the error is ours and deserves its traceback."""
    from hydra.errors import HydraException
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__
    override = _override_of(chain[0])
    if override and not isinstance(chain[0], HydraException):
        return _unexpected(override, chain[0])
    for link in reversed(chain):  # the innermost says it best
        if isinstance(link, (ValueError, OSError)) and not isinstance(link, OmegaConfBaseException):
            if isinstance(link, OSError) and link.strerror:
                said = f"{link.strerror}: {link.filename}" if link.filename else link.strerror
                full = link.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
                return said + ("; free some space or write to another folder" if full else "")
            return _joined(str(link))
        if isinstance(link, RuntimeError) and "PytorchStreamWriter failed" in str(link):
            return f"a checkpoint could not be written ({_joined(str(link))}); is the disk full?"
    for link in chain:
        if isinstance(link, (ConfigAttributeError, ConfigKeyError)) and link.parent_node is not None:
            return _no_such_key(link)
        if isinstance(link, MissingMandatoryValue):
            return f"{link.full_key} is missing; say {link.full_key}=…, as `--help` of the command shows"
    for link in chain:
        if isinstance(link, (HydraException, OmegaConfBaseException)):
            causes = [_joined(str(part)) for part in chain[chain.index(link) :]]
            return "; ".join(dict.fromkeys(causes))
    return None


def _override_of(error: BaseException) -> str | None:
    """What Hydra was merging when this was raised. It says so itself, but for errors that it does not expect."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == "_apply_overrides_to_config" and "override" in frame.f_locals:
            return frame.f_locals["override"].input_line
    return None


def _unexpected(override: str, error: BaseException) -> str:
    """What is wrong with an override where OmegaConf fails with an error of another kind than its own."""
    above = override.split("=")[0].lstrip("+").rpartition(".")[0]
    if isinstance(error, AssertionError) and above:  # it looks for a key in what has none
        return f"{override} sets a part of {above}, which is null; leave it out, or give {above} a value"
    return f"{override} cannot be set ({_joined(str(error))})"


def _no_such_key(error: Any) -> str:
    """A key that the config has not, and those that may have been meant; where none is near, all that are there."""
    above, dot, key = error.full_key.rpartition(".")
    there = [str(name) for name in error.parent_node if name not in ("_target_", "hydra")]
    near = difflib.get_close_matches(key, there, n=2, cutoff=0.5)
    said = f"there is no key {error.full_key}"
    if near:
        return f"{said}; did you mean {' or '.join(above + dot + name for name in near)}?"
    return f"{said}; {above or 'the config'} has {', '.join(there)}"


def _joined(text: str) -> str:
    """Lines of a message joined to one, without OmegaConf's notes on types and Hydra's on folders."""
    text = text.split("Config search path:")[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    kept = [line for line in lines if not line.startswith(("object_type=", "reference_type=", "Set the env"))]
    return re.sub(r":?; ", "; ", "; ".join(kept))
